// Vercel's `ai`, by its provider for servers like OpenAI's.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [url] = Object.values(JSON.parse(process.env.FOLOVLLM_SERVERS));
const made = { name: "folovllm", baseURL: url, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true };
const model = createOpenAICompatible(made)(process.env.FOLOVLLM_MODEL);
const asked = { model, prompt: "What is the weather in Paris?", maxRetries: 0, maxOutputTokens: 300 };
const Weather = z.object({
  city: z.string().regex(/^[A-Z][a-z]{0,11}$/),
  degrees: z.number().int().min(-60).max(60),
  sky: z.enum(["clear", "cloudy", "rain"]),
});
const weather = tool({ description: "The weather.", inputSchema: Weather, execute: async () => "rain" });

test("generateText", async () => {
  const answer = await generateText({ ...asked, maxOutputTokens: 8 });
  assert.ok(answer.text);
  assert.equal(answer.usage.outputTokens, 8);
});

test("streamText", async () => {
  const result = streamText({ ...asked, maxOutputTokens: 8 });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  assert.ok(pieces.length > 2);
  assert.equal((await result.usage).outputTokens, 8);
});

test("generateObject", async () => {
  Weather.parse((await generateObject({ ...asked, schema: Weather })).object);
});

test("generateObject of a choice", async () => {
  const { object } = await generateObject({ ...asked, output: "enum", enum: ["clear", "rain"] });
  assert.ok(["clear", "rain"].includes(object));
});

test("streamObject", async () => {
  const result = streamObject({ ...asked, schema: Weather });
  let pieces = 0;
  for await (const _ of result.partialObjectStream) pieces += 1;
  assert.ok(pieces > 2);
  Weather.parse(await result.object);
});

test("tools: required", async () => {
  const answer = await generateText({ ...asked, tools: { weather }, toolChoice: "required" });
  assert.ok(answer.toolCalls.length);
  for (const call of answer.toolCalls) Weather.parse(call.input);
});

test("tools: named, streamed, run, and answered in a second step", async () => {
  const result = streamText({
    ...asked,
    tools: { weather },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({
      toolChoice: stepNumber ? "none" : { type: "tool", toolName: "weather" },
    }),
  });
  const steps = await result.steps;
  Weather.parse(steps[0].toolCalls[0].input);
  assert.equal(steps[0].toolResults[0].output, "rain");
  assert.ok(steps[1].text);
});
