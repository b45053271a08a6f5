// The page: a conversation, its composer and the suggested prompts. Everything it needs comes from this server.

import { call, streamChat, Trouble } from "./api.js";
import { onKey } from "./key.js";
import { Reply } from "./replies.js";
import { watchPolicy } from "./strip.js";

const MAX_TOKENS = 512;
const SUGGESTIONS = 4;

const by = (id) => document.getElementById(id);
const talk = by("talk");
const message = by("message");
const user = rememberedUser();

let model = "default";
let conversation = newConversation();
let running = null; // the AbortController of the reply that is being spoken
let prompts = null; // null until the server has been asked

/** A random name for this browser, so that a later thumb replaces an earlier one. */
function rememberedUser() {
  try {
    const known = localStorage.getItem("heed-user") ?? `web-${randomId()}`;
    localStorage.setItem("heed-user", known);
    return known;
  } catch {
    return `web-${randomId()}`; // no storage allowed: a name for this visit
  }
}

function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function newConversation() {
  return { id: `web-${randomId()}`, messages: [] };
}

async function say(words) {
  const here = conversation;
  by("welcome")?.remove();
  talk.append(said(words));
  const messages = [...here.messages, { role: "user", content: words }];
  const reply = new Reply(talk, user);
  running = new AbortController();
  speaking(true);
  let reason = null;
  let kept = true;
  try {
    const body = { model, messages, user, max_tokens: MAX_TOKENS, metadata: { conversation: here.id } };
    for await (const piece of streamChat(body, running.signal)) {
      stayAtTheEnd(() => reply.add(piece));
      reason = piece.reason ?? reason;
      kept = piece.heed?.kept ?? kept;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "abort";
    else if (error instanceof Trouble) return stayAtTheEnd(() => reply.fail(error.message));
    else throw error;
  } finally {
    speaking(false);
  }
  stayAtTheEnd(() => reply.end(reason, kept));
  if (reply.text) here.messages = [...messages, { role: "assistant", content: reply.text }];
}

function said(words) {
  const element = document.createElement("p");
  element.className = "said";
  element.textContent = words;
  return element;
}

function speaking(yes) {
  if (!yes) running = null;
  by("send").hidden = yes;
  by("stop").hidden = !yes;
  talk.scrollTop = talk.scrollHeight;
}

/** Keep the newest words in sight, unless the reader has scrolled up. */
function stayAtTheEnd(change) {
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  change();
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

function send(words) {
  if (!words.trim() || running) return;
  message.value = "";
  grow();
  say(words.trim());
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, 180)}px`;
}

function beginAnew() {
  running?.abort();
  conversation = newConversation();
  if (talk.querySelector(".said") && !talk.lastElementChild.matches(".divide")) {
    const divide = document.createElement("p");
    divide.className = "divide";
    divide.textContent = "new chat";
    talk.append(divide);
    talk.scrollTop = talk.scrollHeight;
  }
  message.focus();
}

function suggest() {
  const chosen = [...(prompts ?? [])].sort(() => Math.random() - 0.5).slice(0, SUGGESTIONS);
  by("suggestions").replaceChildren(...chosen.map(suggestion));
  by("prompts").hidden = chosen.length === 0;
}

/** A suggested prompt opens a chat of its own: the built-in model knows them as first messages. */
function suggestion(words) {
  const row = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words;
  button.addEventListener("click", () => {
    if (running) return;
    if (conversation.messages.length) beginAnew();
    send(words);
    suggest();
  });
  row.append(button);
  return row;
}

async function loadPrompts() {
  prompts = [];
  const known = await call("/prompts.json").then((response) => response.json()).catch(() => []);
  prompts = Array.isArray(known) ? known.filter((one) => typeof one === "string") : [];
  suggest();
}

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(message.value);
});
message.addEventListener("keydown", (event) => {
  // an Enter that ends a composed character (Japanese, Chinese …) is not a send
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(message.value);
});
message.addEventListener("input", grow);
by("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
by("new-chat").addEventListener("click", beginAnew);
by("other-prompts").addEventListener("click", suggest);

onKey(() => call("/v1/policy"));

watchPolicy((policy) => {
  model = policy.policy ?? model;
  // while the model is being loaded, the server does not know yet which prompts it knows
  if (prompts === null && policy.speaking !== null) loadPrompts();
});
