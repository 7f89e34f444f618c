// Calls to the service. Knows nothing of the page.

/** What went wrong, in words for a reader; `status` 0 where no response came. `field` and `id` as the service gave them. */
export class Problem extends Error {
  constructor(message, { status = 0, field = null, id = null } = {}) {
    super(message);
    Object.assign(this, { status, field, id });
  }
}

const WORDS = {
  401: "This service asks for an API key. Enter yours under “API key”.",
  403: "This API key is not valid here.",
  429: "The service is busy.",
  503: "The service is not ready.",
  504: "The answer took longer than the service allows.",
};

export async function state() {
  const response = await send("page/state", {});
  return response.json();
}

/** The text of /metrics. No key goes with it: the service asks for none there. */
export async function metrics(signal) {
  const response = await send("metrics", { signal });
  return response.text();
}

/** POST `body` to `path`; the response if it succeeded. Throws Problem, or the abort of `signal`. */
export function post(path, body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /ISO-8859-1|ByteString/.test(error.message)) {
      throw new Problem("An API key holds only plain letters, digits and signs.", { status: 403 });
    }
    throw new Problem("The service cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` Try again in ${wait} ${wait === "1" ? "second" : "seconds"}.` : "";
  const words = WORDS[response.status] ?? said(body?.error) ?? `The service answered with status ${response.status}.`;
  const { field, request_id: id } = body?.error ?? {};
  return new Problem(words + again, { status: response.status, field, id });
}

/** The `error` event of a stream as a Problem. */
export function streamProblem({ error }) {
  return new Problem(said(error) ?? "The service failed.", { field: error?.field, id: error?.request_id });
}

const FIELDS = {
  query: "The question",
  passages: "The passages",
  rate: "The rate",
  max_prompt_tokens: "The prompt budget",
  max_new_tokens: "New tokens",
};

/** An error of the API as a sentence for a reader, who counts from 1: “Passage 1 is empty.” */
function said(error) {
  if (!error?.message) return undefined;
  const [, field, index, rest] = /^(?:(\w+)(?:\.(\d+))?[\w.]*: )?(.*)$/s.exec(error.message);
  const subject = index === undefined ? (FIELDS[field] ?? field) : `Passage ${Number(index) + 1}`;
  const joint = /^(is|must|holds|has) /.test(rest) ? " " : ": ";
  const sentence = subject ? subject + joint + rest : rest.charAt(0).toUpperCase() + rest.slice(1);
  return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
}

/** The events of a response in server-sent event format: `{name, data}`, data parsed as JSON. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return data.length ? { name, data: JSON.parse(data.join("\n")) } : null; // a comment keeps the connection alive
}
