// The API key: asked for when the server wants one, and kept for this visit, in this tab, alone.

const NAME = "heed-key";
const WANTED = "This server needs an API key.";
const WRONG = "This API key is not one of this server's.";

const by = (id) => document.getElementById(id);

let key = remembered();

function remembered() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return ""; // no storage allowed: asked for again after a reload
  }
}

function remember(words) {
  key = words;
  try {
    if (words) sessionStorage.setItem(NAME, words);
    else sessionStorage.removeItem(NAME);
  } catch {
    // kept in this page alone
  }
}

/** The headers that carry the key. */
export function bearing() {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** The server refused a request that carried these headers: ask for a key. Returns why, in words. */
export function refused({ authorization }) {
  // an answer to what was asked before the key was given says nothing of it
  if (authorization !== bearing().authorization) return by("key-trouble").textContent;
  if (authorization || by("key-form").hidden) by("key-trouble").textContent = authorization ? WRONG : WANTED;
  remember("");
  if (by("key-form").hidden) {
    by("key-form").hidden = false;
    by("key").focus();
  }
  return by("key-trouble").textContent;
}

/** `retry` is called with a key that was just given; the form goes away when it succeeds. */
export function onKey(retry) {
  by("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const given = by("key").value.trim();
    // a header carries no other letters
    if (!/^[!-~]+$/.test(given)) return void (by("key-trouble").textContent = given ? WRONG : WANTED);
    remember(given);
    try {
      await retry();
      by("key").value = "";
      by("key-form").hidden = true;
      by("message").focus();
    } catch (error) {
      by("key-trouble").textContent = error.message;
    }
  });
}
