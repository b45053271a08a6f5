// The strip at the top: what speaks, how much feedback was counted, and whether people like it more.

import { call } from "./api.js";

const POLL_MS = 2000;
const VERSIONS_SHOWN = 6;

const by = (id) => document.getElementById(id);

/** Ask for the policy every two seconds while the page is seen; `onPolicy` hears of each answer. */
export async function watchPolicy(onPolicy) {
  let known = null;
  for (;;) {
    if (!document.hidden) {
      try {
        const policy = await (await call("/v1/policy")).json();
        const speaking = policy.speaking === undefined ? (policy.current ?? "v0") : policy.speaking;
        show(policy, speaking);
        if (known && speaking && known !== speaking) announce(speaking);
        known = speaking ?? known;
        onPolicy(policy);
      } catch (error) {
        by("strip").classList.add("away");
        by("why").textContent = error.message;
      }
    }
    await new Promise((wake) => setTimeout(wake, POLL_MS));
  }
}

/** `speaking` is null while the model is being loaded. */
function show(policy, speaking) {
  by("strip").classList.remove("away");
  by("current").textContent = speaking ?? "loading…";
  by("current").title = speaking === "v0" ? "the base model, before any feedback" : "";
  by("shipping").textContent = shipping(policy);
  by("counted").textContent = counted(policy.feedback).toLocaleString();
  by("why").textContent = sentence(policy.problem ?? policy.why ?? "");
  showLiked(policy.liked ?? {}, speaking);
}

function shipping({ candidate, paused }) {
  if (paused) return "· paused";
  return candidate ? `· ${candidate} is being tried` : "";
}

/** All feedback, whatever the kind; what was dropped is not counted. */
function counted(feedback) {
  const fates = Object.entries(feedback?.by_status ?? {}).filter(([fate]) => fate !== "dropped");
  return fates.reduce((sum, [, count]) => sum + count, 0);
}

function showLiked(liked, speaking) {
  const rated = Object.entries(liked).filter(([, one]) => typeof one?.share === "number");
  if (rated.length === 0) return;
  const rows = rated.sort(([a], [b]) => number(a) - number(b)).slice(-VERSIONS_SHOWN);
  by("liked").replaceChildren(...rows.map(([version, one]) => likedRow(version, one, version === speaking)));
  if (speaking && !liked[speaking]) by("liked").append(text("li", `${speaking} not rated yet`));
}

function likedRow(version, { share, count }, isCurrent) {
  const percent = Math.round(share * 100);
  const row = document.createElement("li");
  row.className = isCurrent ? "current" : "";
  row.title = `${percent}% of ${count ?? "?"} ratings of ${version} were good`;
  const bar = document.createElement("span");
  bar.className = "bar";
  const filled = document.createElement("i");
  filled.style.width = `${percent}%`;
  bar.append(filled);
  row.append(text("b", version), bar, text("span", `${percent}%`), text("small", count == null ? "" : `of ${count}`));
  return row;
}

function announce(version) {
  by("arrival").textContent = version === "v0" ? "The base speaks again." : `${version} has arrived and speaks from now on.`;
  by("current").classList.remove("fresh");
  void by("current").offsetWidth; // so that the animation starts anew
  by("current").classList.add("fresh");
  setTimeout(() => (by("arrival").textContent = ""), 12000);
}

function sentence(words) {
  return words.charAt(0).toUpperCase() + words.slice(1) + (/[\w`]$/.test(words) ? "." : "");
}

function text(tag, content) {
  const element = document.createElement(tag);
  element.textContent = content;
  return element;
}

function number(version) {
  return Number(version.replace(/^v/, ""));
}
