// The npm package `openai`.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url] = Object.values(JSON.parse(process.env.FOLOVLLM_SERVERS));
const model = process.env.FOLOVLLM_MODEL;
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const Weather = z.object({
  city: z.string().regex(/^[A-Z][a-z]{0,11}$/),
  degrees: z.number().int().min(-60).max(60),
  sky: z.enum(["clear", "cloudy", "rain"]),
});
const tools = [{ type: "function", function: { name: "weather", parameters: z.toJSONSchema(Weather) } }];
const named = { type: "function", function: { name: "weather" } };

test("chat", async () => {
  const question = [{ role: "user", content: "What is the capital of France?" }];
  const answer = await client.chat.completions.create({ model, messages: question, max_tokens: 12, temperature: 0 });
  assert.match(answer.choices[0].message.content, /Paris/);
});

test("stream", async () => {
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 12, stream: true });
  let text = "";
  for await (const piece of stream) text += piece.choices[0]?.delta?.content ?? "";
  assert.ok(text);
});

test("parse with zod", async () => {
  const response_format = zodResponseFormat(Weather, "weather");
  const answer = await client.chat.completions.parse({ model, messages, response_format, max_tokens: 300 });
  Weather.parse(answer.choices[0].message.parsed);
});

for (const [name, tool_choice] of Object.entries({ required: "required", named })) {
  test(`tool_choice ${name}`, async () => {
    const asked = { model, messages, tools, tool_choice, parallel_tool_calls: false, max_tokens: 300 };
    const answer = await client.chat.completions.create(asked);
    const [call] = answer.choices[0].message.tool_calls;
    Weather.parse(JSON.parse(call.function.arguments));
  });
}

test("streamed tool call", async () => {
  const asked = { model, messages, tools, tool_choice: named, max_tokens: 300 };
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  Weather.parse(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments));
});

test("a tool that is run", async () => {
  const seen = [];
  const run = { ...tools[0].function, parse: JSON.parse, function: (given) => (seen.push(given), "rain") };
  const asked = { model, messages, tools: [{ type: "function", function: run }], tool_choice: named, max_tokens: 300 };
  await client.chat.completions.runTools(asked).done();
  Weather.parse(seen[0]);
});
