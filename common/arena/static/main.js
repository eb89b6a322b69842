// The page: what was chosen, the events of the race as they come, and their replay side by side.
// Every event is shown when it comes, and kept: a replay shows the same events again, each at its own time.

import { Lane } from "./lane.js";

const $ = (id) => document.getElementById(id);
const GONE = "The arena does not answer. Is it still running? This page tries again.";
const LIVE_PAUSE = 250; // ms between two pictures of a live run: drawing takes processor time from the engine
const setup = await (await fetch("/api/setup")).json();
const lanes = setup.sides.map((side) => new Lane(side, setup.figures, $("lane")));
const stages = setup.sides.map((side) => side.stage);
let race = null; // that is on or shown: its event, and { recordings: [[event]], failures: [text], verdict, over }
let playback = null; // { started, next: [index of each lane's next event] }
let catchingUp = false;
let lastDrawn = 0;

// -- what there is to choose ------------------------------------------------------------------------------------------

$("lanes").append(...lanes.map((lane) => lane.root));
$("lanes").style.setProperty("--lanes", Math.min(lanes.length, 4));
$("who").textContent = stages.join(" against ");
document.title = `${stages.join(" against ")} – FoloVLLM arena`;
for (const preset of setup.presets) $("preset").add(new Option(preset.title, preset.key));

const chosen = () => ({
  preset: setup.presets.find((preset) => preset.key === $("preset").value),
  mode: document.querySelector('input[name="mode"]:checked').value,
});

function fairness(mode) {
  const each = Math.max(1, Math.floor(setup.cores / lanes.length));
  return mode === "turns"
    ? `In turns: each stage has the whole machine (${setup.cores} cores), one after the other; then the recordings ` +
      "play side by side in real time."
    : `Together: all at once, ${each} of ${setup.cores} cores each. They share caches and memory bandwidth, so each ` +
      "is slower than alone.";
}

// The claim of the race on the screen; below it, what was chosen since.
function explain() {
  const { preset, mode } = chosen();
  const next = race && (race.preset !== preset.key || race.mode !== mode);
  $("claim").textContent = (race ?? preset).claim;
  $("fairness").textContent = next ? `Next: ${preset.title}. ${preset.claim} ${fairness(mode)}` : fairness(mode);
  if (!race) for (const lane of lanes) lane.watch(preset.watch);
}

$("controls").addEventListener("change", () => {
  explain();
  buttons();
});

// -- commands ---------------------------------------------------------------------------------------------------------

async function post(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  try {
    const answer = await (await fetch(path, options)).json();
    if (answer.error) say(answer.error);
  } catch {
    say(GONE);
  }
}

// Buttons that can do nothing now keep the focus of the keyboard: they say that they are disabled, and do nothing.
function able(name, can) {
  $(name).setAttribute("aria-disabled", !can);
}

function onClick(name, action) {
  $(name).addEventListener("click", () => $(name).ariaDisabled === "true" || action());
}

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("run").ariaDisabled === "true") return;
  const { preset, mode } = chosen();
  const prompts = preset.key === "own" ? $("prompts").value.split("\n") : [];
  post("/api/race", { preset: preset.key, mode, prompts });
});
onClick("stop", () => (playback ? endPlayback() : post("/api/stop", {})));
onClick("replay", startPlayback);

function say(text) {
  $("status").textContent = text;
}

function buttons() {
  const running = race !== null && !race.over;
  $("own").hidden = chosen().preset.key !== "own" || running || playback; // a race needs its place
  able("run", !running);
  able("stop", running || playback);
  able("replay", !running && race && race.recordings.some((events) => events.length > 1));
}

// -- events -----------------------------------------------------------------------------------------------------------

const handlers = {
  welcome(event) { // also after a restart of the arena: all earlier state is void
    if (event.stages.join() !== stages.join()) location.reload();
    catchingUp = true;
    race = playback = null;
    for (const lane of lanes) {
      lane.reset(null);
      lane.badge("");
    }
    say("Press Race to begin.");
    explain();
  },
  now() {
    catchingUp = false;
    draw(true);
  },
  race(event) {
    playback = null;
    race = { ...event, recordings: lanes.map(() => []), failures: [], verdict: "", over: false };
    for (const lane of lanes) {
      lane.reset(null);
      lane.watch(event.watch);
      lane.badge("loads");
    }
    $("preset").value = event.preset; // on every page that watches
    document.querySelector(`input[name="mode"][value="${event.mode}"]`).checked = true;
    explain();
    say("Loading and warming up.");
  },
  turn(event) {
    for (const [number, lane] of lanes.entries()) {
      if (event.sides.includes(number)) lane.badge("live", true);
      else if (!lane.ended && !lane.failed) lane.badge("its turn comes");
    }
    say(`${event.sides.map((number) => lanes[number].stage).join(" and ")}: live.`);
  },
  finished(event) {
    race.over = true;
    race.verdict = event.verdict;
    for (const lane of lanes) if (!lane.ended && !lane.failed) lane.badge("");
    if (race.mode === "turns" && !catchingUp && event.verdict) startPlayback();
    else say(ending());
  },
};

const ending = () => race.verdict || race.failures.filter(Boolean).join(" ") || "Stopped.";

function ofSide(event) {
  const lane = lanes[event.side];
  if (event.event === "loading") {
    const far = event.total ? `, ${event.done} of ${event.total}` : "";
    say(`${lane.stage}: ${event.text}${far}.`);
    $("far").hidden = !event.total;
    $("far").max = event.total || 1;
    if (event.done) $("far").value = event.done;
    else $("far").removeAttribute("value"); // nothing is done yet: a bar that moves, not an empty one
    return;
  }
  if (event.event === "failed") {
    race.failures[event.side] = `${lane.stage}: ${event.message}`;
    lane.fail(event.message);
    say(race.failures[event.side]);
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
  if (event.event !== "loading" && event.event !== "now") $("far").hidden = true;
  if (event.side !== undefined) ofSide(event);
  else handlers[event.event](event);
  buttons();
  if (!catchingUp) draw(event.event !== "step");
};
stream.onerror = () => {
  if (race) race.over = true; // its end cannot be heard; should it go on, the next welcome tells of it
  say(GONE);
  buttons();
};

// -- replay -----------------------------------------------------------------------------------------------------------

function startPlayback() {
  for (const [number, lane] of lanes.entries()) {
    lane.reset(race.recordings[number][0] || null);
    lane.watch(race.watch);
    lane.badge("replay", true);
    if (race.failures[number]) lane.fail(race.failures[number]);
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
  say(ending());
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
