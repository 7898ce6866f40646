// OpenAI's own client for JavaScript against an address: prints what it got, as one JSON object.
// node client.mjs ADDRESS   (NODE_PATH is not read by ES modules: the test copies this file beside node_modules)
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const asked = { model: "base", messages, max_tokens: 16, temperature: 1, seed: 3 };
const tool = {
  type: "function",
  function: {
    name: "get_time",
    parameters: { type: "object", properties: { zone: { enum: ["UTC", "CET"] } }, required: ["zone"], additionalProperties: false },
  },
};
const found = {};

found.models = (await client.models.list()).data.map((model) => model.id);
found.chat = (await client.chat.completions.create(asked)).choices[0].message.content;

let text = "", usage = null;
const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
found.streamed = text;
found.completion_tokens = usage.completion_tokens;

found.helper = await client.chat.completions.stream(asked).finalContent();

const called = await client.chat.completions
  .stream({ ...asked, max_tokens: 64, tools: [tool], tool_choice: "required" }).finalChatCompletion();
found.call = called.choices[0].message.tool_calls[0].function;

const response = await client.responses.create({ model: "base", input: "Say hello.", max_output_tokens: 16, temperature: 0 });
found.response = response.output_text;
let told = "";
for await (const event of await client.responses.create({ model: "base", input: "Say hello.", max_output_tokens: 16, temperature: 0, stream: true }))
  if (event.type === "response.output_text.delta") told += event.delta;
found.response_streamed = told;

found.embedding = (await client.embeddings.create({ model: "base", input: "Llamas" })).data[0].embedding.length;

try {
  await client.chat.completions.create({ ...asked, model: "nobody" });
} catch (error) {
  found.error = { name: error.constructor.name, status: error.status, code: error.code };
}

// One that leaves in the middle: the next request is answered.
const left = await client.chat.completions.create({ ...asked, max_tokens: 200, stream: true });
for await (const chunk of left) break;
found.after = (await client.chat.completions.create(asked)).choices[0].message.content;

console.log(JSON.stringify(found));
