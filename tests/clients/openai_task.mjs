// A whole task with the official client for Node: argument 1 is the server, 2 the model.
import assert from 'node:assert';
import OpenAI from 'openai';

const [, , baseURL, model] = process.argv;
const client = new OpenAI({ baseURL, apiKey: 'k', maxRetries: 0 });
const parameters = { type: 'object', properties: { city: { type: 'string' } } };
const run = (text) => {
  assert.deepStrictEqual(JSON.parse(text), { city: 'Paris' });
  return 'sunny, 21 degrees';
};

async function chat() {
  const tools = [{ type: 'function', function: { name: 'get_weather', parameters } }];
  const messages = [{ role: 'user', content: 'Weather by chat from Node?' }];
  let { message } = (await client.chat.completions.create({ model, messages, tools })).choices[0];
  messages.push(message);
  for (const call of message.tool_calls) {
    const content = run(call.function.arguments);
    messages.push({ role: 'tool', tool_call_id: call.id, content });
  }
  const stream = client.chat.completions.stream({ model, messages, tools });
  assert.strictEqual(await stream.finalContent(), 'It is sunny.');
}

async function toolRunner() {
  const runner = client.chat.completions.runTools({
    model,
    messages: [{ role: 'user', content: 'Weather by tool runner from Node?' }],
    tools: [{
      type: 'function',
      function: { name: 'get_weather', parameters, parse: (text) => text, function: run },
    }],
  });
  assert.strictEqual(await runner.finalContent(), 'It is sunny.');
}

async function responses() {
  const tools = [{ type: 'function', name: 'get_weather', parameters, strict: false }];
  const input = 'Weather by responses from Node?';
  const stream = client.responses.stream({ model, input, tools });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  assert(kinds.includes('response.function_call_arguments.delta'));
  const first = await stream.finalResponse();
  const call = first.output.at(-1);
  const last = await client.responses.create({
    model,
    tools,
    previous_response_id: first.id,
    input: [{ type: 'function_call_output', call_id: call.call_id, output: run(call.arguments) }],
  });
  assert.strictEqual(last.output_text, 'It is sunny.');
}

await chat();
await toolRunner();
await responses();
console.log('all done');
