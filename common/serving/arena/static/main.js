// The page: what was chosen, the events of the race as they come, and their replay side by side.
// Every event is shown when it comes, and kept: a replay shows the same events again, each at its own time.

import { Lane } from "./lane.js";

const $ = (id) => document.getElementById(id);
const LIVE_PAUSE = 250; // ms between two pictures of a live run: drawing takes processor time from the engine
const setup = await (await fetch("/api/setup")).json();
const lanes = setup.sides.map((side) => new Lane(side, setup.figures, $("lane")));
let race = null; // { mode, watch, recordings: [[event]], verdict, over }
let playback = null; // { started, next: [index of each lane's next event] }
let catchingUp = false;
let lastDrawn = 0;

// -- what there is to choose ------------------------------------------------------------------------------------------

$("lanes").append(...lanes.map((lane) => lane.root));
$("who").textContent = setup.sides.map((side) => side.stage).join(" against ");
document.title = `${setup.sides.map((side) => side.stage).join(" against ")} – FoloVLLM arena`;
for (const [index, preset] of setup.presets.entries()) {
  const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
  Object.assign(input, { type: "radio", name: "preset", value: preset.key, checked: index === 0 });
  text.textContent = preset.title;
  label.append(input, text);
  $("presets").append(label);
}

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function explain() {
  const preset = setup.presets.find((one) => one.key === chosen("preset"));
  const each = Math.max(1, Math.floor(setup.cores / lanes.length));
  $("own").hidden = preset.key !== "own";
  $("claim").textContent = preset.claim;
  $("fairness").textContent = chosen("mode") === "turns"
    ? `In turns: each stage has the whole machine (${setup.cores} cores), one after the other; then both recordings ` +
      "play side by side in real time."
    : `Together: all at once, ${each} of ${setup.cores} cores each. They share caches and memory bandwidth, so each ` +
      "is slower than alone.";
  if (!race || race.over) for (const lane of lanes) lane.watch(preset.watch);
}

$("controls").addEventListener("change", explain);
explain();

// -- commands ---------------------------------------------------------------------------------------------------------

async function post(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await (await fetch(path, options)).json();
  if (answer.error) say(answer.error);
}

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompts = chosen("preset") === "own" ? $("prompts").value.split("\n") : [];
  post("/api/race", { preset: chosen("preset"), mode: chosen("mode"), prompts });
});
$("stop").addEventListener("click", () => (playback ? endPlayback() : post("/api/stop", {})));
$("replay").addEventListener("click", startPlayback);

function say(text) {
  $("status").textContent = text;
}

function buttons() {
  const running = race !== null && !race.over;
  $("run").disabled = running;
  $("stop").disabled = !running && !playback;
  $("replay").disabled = running || !race || race.recordings.every((events) => events.length === 0);
}

// -- events -----------------------------------------------------------------------------------------------------------

const handlers = {
  welcome() {
    catchingUp = true;
  },
  now() {
    catchingUp = false;
    draw(true);
  },
  race(event) {
    playback = null;
    race = { ...event, recordings: lanes.map(() => []), verdict: "", over: false, failed: false };
    for (const lane of lanes) {
      lane.reset(null);
      lane.watch(event.watch);
      lane.badge("loads");
    }
    for (const [name, value] of [["preset", event.preset], ["mode", event.mode]]) {
      document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true; // on every page that watches
    }
    explain();
    say("Loading and warming up.");
  },
  turn(event) {
    for (const [number, lane] of lanes.entries()) {
      if (event.sides.includes(number)) lane.badge("live", true);
      else if (!lane.ended) lane.badge("its turn comes");
    }
    say(`${event.sides.map((number) => lanes[number].stage).join(" and ")}: live.`);
  },
  finished(event) {
    race.over = true;
    race.verdict = event.verdict;
    if (race.mode === "turns" && !catchingUp && event.verdict) startPlayback();
    else if (!race.failed) say(event.verdict || "Stopped.");
  },
};

function ofSide(event) {
  const lane = lanes[event.side];
  if (event.event === "failed") {
    race.failed = true;
    lane.badge("failed");
    say(`${lane.stage}: ${event.message}`);
    return;
  }
  if (event.event === "prepared") {
    lane.reset(event);
    lane.badge("ready");
    const model = `${event.model}, ${event.dtype}, ${event.threads} thread${event.threads > 1 ? "s" : ""}`;
    $("setting").textContent = model;
  }
  race.recordings[event.side].push(event);
  if (event.event === "prepared" || event.event === "started") return;
  lane.apply(event);
  if (event.event === "ended") {
    lane.badge(event.stopped ? "stopped" : "done");
    lane.describe();
  }
}

const stream = new EventSource("/api/events");
stream.onmessage = (message) => {
  const event = JSON.parse(message.data);
  if (event.side !== undefined) ofSide(event);
  else handlers[event.event](event);
  buttons();
  if (!catchingUp) draw(event.event !== "step");
};
stream.onerror = () => say("The arena does not answer. Is it still running? This page tries again.");

// -- replay -----------------------------------------------------------------------------------------------------------

function startPlayback() {
  for (const [number, lane] of lanes.entries()) {
    lane.reset(race.recordings[number][0] || null);
    lane.watch(race.watch);
    lane.badge("replay", true);
  }
  playback = { clock: 0, last: performance.now(), next: lanes.map(() => 1) };
  say("The recordings, side by side" + ($("speed").value === "1" ? ", in real time." : "."));
  buttons();
  requestAnimationFrame(playOn);
}

function playOn(time) {
  if (!playback) return;
  playback.clock += ((time - playback.last) / 1000) * Number($("speed").value);
  playback.last = time;
  show(playback.clock);
  draw(true, playback.clock);
  if (lanes.every((lane, number) => playback.next[number] >= race.recordings[number].length)) endPlayback();
  else requestAnimationFrame(playOn);
}

// Apply all events up to a time.
function show(clock) {
  for (const [number, lane] of lanes.entries()) {
    const events = race.recordings[number];
    while (playback.next[number] < events.length && (events[playback.next[number]].t ?? 0) <= clock) {
      lane.apply(events[playback.next[number]++]);
    }
    if (lane.ended) lane.badge("done");
  }
}

function endPlayback() {
  show(Infinity);
  playback = null;
  for (const lane of lanes) lane.describe();
  say(race.verdict || "End of the recordings.");
  buttons();
  draw(true);
}

// -- pictures ---------------------------------------------------------------------------------------------------------

// One scale for all lanes: the longest recording; before its end is known, a little more than the clock.
function span() {
  const times = race ? race.recordings.map((events) => events.at(-1)?.t ?? 0) : [0];
  const longest = Math.max(...times, 0.5);
  return race && !race.over ? Math.ceil(longest / 2.5 + 0.2) * 2.5 : longest * 1.02;
}

function draw(now, clock = 0) {
  const time = performance.now();
  if (!now && time - lastDrawn < LIVE_PAUSE) return;
  lastDrawn = time;
  for (const lane of lanes) lane.draw(span(), lane.ended ? lane.clock : clock);
}

// -- light and dark ---------------------------------------------------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
  draw(true);
}

$("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", next);
  theme(next);
});
prefersDark.addEventListener("change", () => theme(prefersDark.matches ? "dark" : "light"));
theme(document.documentElement.dataset.theme);
new ResizeObserver(() => draw(true, playback ? playback.clock : 0)).observe($("lanes"));
buttons();
