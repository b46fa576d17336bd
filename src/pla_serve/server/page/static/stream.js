// Server-sent events over fetch. EventSource cannot send an Authorization header.

const MOST_EVENT = 4 * 2 ** 20;

/** An answer of the server other than 200: its status, and the message that it gave. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Headers with the key, if there is one. */
export function authorized(key, more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

/**
 * Yields the data of each event of an answer.
 *
 * Throws Refused if the server refuses, and what fetch throws if it cannot be reached.
 */
export async function* events(url, options) {
  const answer = await fetch(url, { cache: "no-store", ...options });
  if (!answer.ok) throw new Refused(answer.status, await refusal(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      if (rest.length > MOST_EVENT) throw new Error("an event is too large");
      for (const block of blocks) {
        const data = block
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, ""))
          .join("\n");
        if (data) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function refusal(answer) {
  try {
    const body = await answer.json();
    return String(body.error?.message ?? body.message ?? answer.statusText);
  } catch {
    return answer.statusText || `status ${answer.status}`;
  }
}
