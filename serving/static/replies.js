// One reply on the page: its text, the version that spoke, the thumbs, and the story of a thumb.

import { call, postJson } from "./api.js";

const STEPS = [
  ["accepted", "counted"],
  ["joined", "matched"],
  ["in_reward_model", "learned from"],
  ["in_version", "in a new version"],
  ["served", "served"],
];
// in_update lies between two of the steps shown
const REACHED = { accepted: 0, joined: 1, in_reward_model: 2, in_update: 2, in_version: 3, served: 4 };
const ENDINGS = {
  dropped: "was not used",
  superseded: "was replaced by your later thumb",
  retracted: "taken back",
};
const POLL_MS = 2000;
const SLOW_POLL_MS = 10000;
const SLOW_AFTER_MS = 120000;

/** "v3" of "default@v3"; the base's own name is v0. */
export function versionOf(model) {
  const at = (model ?? "").lastIndexOf("@");
  return at < 0 ? "v0" : model.slice(at + 1);
}

export class Reply {
  /** Puts an empty reply into `talk`; `user` is who rates it. */
  constructor(talk, user) {
    const template = document.getElementById("reply-template");
    this.element = template.content.firstElementChild.cloneNode(true);
    this.user = user;
    this.text = "";
    this.given = null; // {id, value}
    this.part = (selector) => this.element.querySelector(selector);
    for (const button of this.thumbs()) button.addEventListener("click", () => this.rate(button.dataset.value));
    talk.append(this.element);
  }

  thumbs() {
    return [...this.element.querySelectorAll(".thumb")];
  }

  /** A piece of the stream has come. */
  add({ id, model, text }) {
    this.id ??= id;
    if (model && !this.model) {
      this.model = model;
      const version = this.part(".version");
      version.textContent = versionOf(model);
      version.title = `This reply was spoken by ${model}`;
      version.hidden = false;
    }
    this.text += text;
    this.part(".text").textContent = this.text;
  }

  /** The reply is whole, or was stopped. `kept` is false when the server did not keep it. */
  end(reason, kept = true) {
    this.element.setAttribute("aria-busy", "false");
    if (!this.text) this.part(".text").textContent = "(no words)";
    if (reason === "abort") this.note("stopped");
    if (reason === "length") this.note("cut off at the longest reply");
    if (!kept) this.note("not kept, so it cannot be rated");
    for (const button of this.thumbs()) button.hidden = !(this.id && kept);
  }

  fail(message) {
    this.element.setAttribute("aria-busy", "false");
    this.element.classList.add("failed");
    this.part(".text").textContent = this.text;
    this.part(".text").hidden = !this.text;
    this.note(message);
    this.part(".note").setAttribute("role", "alert");
  }

  note(text) {
    this.part(".note").textContent = text;
  }

  /** A thumb was pressed: the same one again takes it back, the other one replaces it. */
  async rate(value) {
    const takingBack = this.given?.value === value;
    for (const button of this.thumbs()) button.disabled = true;
    try {
      await (takingBack ? this.takeBack() : this.give(value));
      this.note("");
    } catch (error) {
      this.note(error.message);
    } finally {
      for (const button of this.thumbs()) {
        button.disabled = false;
        button.setAttribute("aria-pressed", String(this.given?.value === button.dataset.value));
      }
    }
  }

  async give(value) {
    const body = { kind: "thumb", reply_id: this.id, value, user: this.user };
    const { id, status } = await (await postJson("/v1/feedback", body)).json();
    this.given = { id, value };
    this.told = null;
    this.tell({ status });
    this.part(".story").scrollIntoView({ block: "nearest" });
    this.follow(id);
  }

  async takeBack() {
    await call(`/v1/feedback/${encodeURIComponent(this.given.id)}`, { method: "DELETE" });
    this.given = null;
    this.tell({ status: "retracted" });
  }

  /** Ask for the thumb's story until it has ended or another thumb has replaced it. */
  async follow(id) {
    const begun = Date.now();
    for (;;) {
      const pause = Date.now() - begun > SLOW_AFTER_MS ? SLOW_POLL_MS : POLL_MS;
      await new Promise((wake) => setTimeout(wake, pause));
      if (this.given?.id !== id || !this.element.isConnected) return;
      const story = await call(`/v1/feedback/${encodeURIComponent(id)}`).then((r) => r.json()).catch(() => null);
      if (this.given?.id !== id || !story) continue;
      this.tell(story);
      if (story.status === "served" || ENDINGS[story.status]) return;
    }
  }

  /** Show how far a thumb has come; nothing is touched, or read aloud, unless that has changed. */
  tell({ status, history = [] }) {
    if (status === this.told) return;
    this.told = status;
    const list = this.part(".story");
    list.hidden = false;
    list.replaceChildren();
    if (ENDINGS[status]) {
      const reason = history.findLast?.((entry) => entry.status === status)?.reason;
      list.append(item(reason ? `${ENDINGS[status]}: ${reason.replaceAll("_", " ")}` : ENDINGS[status], "ended"));
      return;
    }
    const version = history.findLast?.((entry) => entry.version != null)?.version;
    const named = version == null ? null : String(version).replace(/^(?=\d)/, "v");
    STEPS.forEach(([, words], step) => {
      const text = named && step === 3 ? `in ${named}` : words;
      list.append(item(text, step <= REACHED[status] ? "done" : "ahead"));
    });
  }
}

function item(text, state) {
  const element = document.createElement("li");
  element.textContent = text;
  element.className = state;
  if (state === "ahead") element.setAttribute("aria-label", `not yet: ${text}`);
  return element;
}
