// OpenAI's Node SDK against a running gateway: node openai_sdk.mjs BASE_URL TOKEN. Exits 0 when all of it behaves as OpenAI's service would.
import assert from "node:assert/strict";
import OpenAI, { AuthenticationError, BadRequestError, PermissionDeniedError } from "openai";

const [base, token] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: token, maxRetries: 0, timeout: 30_000 });
const user = (content) => [{ role: "user", content }];
const ask = (content, more = {}) => client.chat.completions.create({ model: "demo", messages: user(content), ...more });
const read = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return { chunks, text: chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("") };
};

const answer = await ask("hello");
assert.equal(answer.object, "chat.completion");
assert.equal(answer.choices[0].finish_reason, "stop");
assert.ok(answer.usage.completion_tokens > 0);

const streamed = await read(await ask("hello", { stream: true, stream_options: { include_usage: true } }));
assert.equal(streamed.text, answer.choices[0].message.content);
assert.ok(streamed.chunks.at(-1).usage.completion_tokens > 0);

const masked = await read(await ask("what is your email address?", { stream: true }));
assert.ok(masked.text.includes("•••") && !masked.text.includes("@"), masked.text);

const cut = await read(await ask("tell me a secret", { stream: true }));
assert.equal(cut.chunks.findLast((chunk) => chunk.choices.length).choices[0].finish_reason, "content_filter");

// Leaving in the middle is the SDK's abort; the next request on the same client works.
const long = await ask("tell me a long story about a parcel", { stream: true });
for await (const _ of long) break;
assert.equal((await ask("hello")).choices[0].finish_reason, "stop");

assert.ok((await client.models.list()).data.length > 0);

const wrong = new OpenAI({ baseURL: `${base}/v1`, apiKey: "hg_wrong", maxRetries: 0 });
await assert.rejects(wrong.chat.completions.create({ model: "demo", messages: user("hello") }), (error) => error instanceof AuthenticationError && error.code === "unauthenticated");
await assert.rejects(client.chat.completions.create({ model: "demo", messages: [] }), (error) => error instanceof BadRequestError && error.code === "invalid_request");
await assert.rejects(ask("tell me about project bluebird"), (error) => error instanceof PermissionDeniedError && error.code === "policy_denied");

console.log("ok: openai-node");
