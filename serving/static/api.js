// Talking to the server: streamed chats, feedback, and errors in plain words.

import { bearing, refused } from "./key.js";

/** What went wrong, in words for the person at the page. */
export class Trouble extends Error {}

const PLAIN = {
  context_length_exceeded: "This conversation has become too long for the model. Start a new chat.",
  not_stored: "This reply was not kept, so it cannot be rated.",
};

/** fetch, with failures told plainly. Aborts are passed on as they are. */
export async function call(path, options = {}) {
  let response;
  const key = bearing();
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...key } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (response.status === 401) throw new Trouble(refused(key));
  if (!response.ok) throw await troubleOf(response);
  return response;
}

export async function postJson(path, body, options = {}) {
  const headers = { "content-type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), ...options });
}

/**
 * Send a chat and yield what comes back: {id, model, text} for each piece, and at the end {reason}.
 * A reply that the server gives up on throws Trouble; one that breaks off in the middle as well.
 */
export async function* streamChat(body, signal) {
  const response = await postJson("/v1/chat/completions", { ...body, stream: true }, { signal });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Trouble(plainly(chunk.error, 500));
    const choice = chunk.choices?.[0] ?? {};
    ended ||= Boolean(choice.finish_reason);
    yield { id: chunk.id, model: chunk.model, text: choice.delta?.content ?? "", reason: choice.finish_reason, heed: chunk.heed };
  }
  if (!ended) throw new Trouble("The reply broke off: the server closed the connection.");
}

/** The data of each server-sent event, however the network cut them into pieces. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (left + value).split(/\r\n|\n|\r(?!$)/);
      left = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The connection to the server was lost in the middle of the reply.");
  }
}

async function troubleOf(response) {
  const body = await response.json().catch(() => ({}));
  const trouble = new Trouble(plainly(body.error ?? {}, response.status, response.headers.get("retry-after")));
  trouble.status = response.status;
  return trouble;
}

function plainly(error, status, retryAfter) {
  const soon = retryAfter ? `in ${retryAfter} s` : "in a moment";
  if (PLAIN[error.code]) return PLAIN[error.code];
  if (error.code === "rate_limit_exceeded") return `Your API key has been used as often as it may. Try again ${soon}.`;
  if (status === 429) return `The server is busy. Try again ${soon}.`;
  if (status === 503) return `The server is starting or stopping. Try again ${soon}.`;
  if (status >= 500) return `Something failed in the server${error.message ? `: ${error.message}` : "."}`;
  return error.message ?? `The server refused this (status ${status}).`;
}
