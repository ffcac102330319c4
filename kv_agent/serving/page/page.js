// The page: which view the address names, whose key is used, and what is said to those who listen.

import { Refused, get, session } from "./api.js";
import { button, el, field, trouble } from "./dom.js";
import { liveView } from "./live.js";
import { memoriesView } from "./memories.js";
import { memoryView } from "./memory.js";
import { overviewView } from "./overview.js";
import { queryView } from "./query.js";

const main = document.getElementById("main");
const whose = document.getElementById("whose");
const said = document.getElementById("said");

const VIEWS = {
  overview: { title: "Overview", draw: overviewView },
  memories: { title: "Memories", draw: memoriesView },
  memory: { title: "Memory", draw: memoryView, under: "memories" },
  query: { title: "Query", draw: queryView },
  live: { title: "Live", draw: liveView },
};

let leaving = new AbortController();
let stats = null; // of the namespace that is looked into, once the server let us in

/** Where the address leads: `#/NAME/ID?PARAMETERS`. */
function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id] = path.split("/");
  const view = VIEWS[name || "overview"] ?? VIEWS.overview;
  return { view, name: name || "overview", id: decoded(id), parameters: new URLSearchParams(query) };
}

function decoded(id) {
  try {
    return decodeURIComponent(id ?? "");
  } catch {
    return id; // written by hand
  }
}

/** Say something to those who see and to those who hear. */
function say(text) {
  said.textContent = text;
  said.classList.add("seen");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => said.classList.remove("seen"), 5000);
}

/** Draw the view that the address names; `moved` where somebody came from another one. */
async function show(moved) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { view, name, id, parameters } = place();
  document.title = `${view.title} · Memory`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === (view.under ?? name)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = el("h1", { tabindex: "-1" }, view.title);
  const content = el("div", { class: "view" });
  main.replaceChildren(heading, content);
  main.setAttribute("aria-busy", "true");
  if (moved) {
    heading.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  const guard = (error, retry) => {
    if (error.name === "AbortError" || signal.aborted) return null;
    if (error.status === 401) return askForKey(session.key ? error.message : "");
    if (!(error instanceof Refused)) console.error(error);
    return trouble(error, retry);
  };
  try {
    stats ??= await get("/stats", undefined, signal);
    drawWhose();
    await view.draw({ content, heading, id, parameters, signal, stats, say, guard, again: () => enter() });
  } catch (error) {
    const notice = guard(error, () => enter());
    if (notice) content.replaceChildren(notice);
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
}

/** Begin anew, with another key or namespace or after trouble. */
function enter() {
  stats = null;
  return show(false);
}

function drawWhose() {
  const leave = () => {
    session.key = null;
    session.namespace = null;
    location.hash = "#/";
    whose.replaceChildren();
    enter();
    say("The key is forgotten.");
  };
  const home = () => {
    session.namespace = null;
    location.hash = "#/";
    enter();
  };
  whose.replaceChildren(
    el("span", { class: "namespace", title: "The namespace whose memories these are" }, stats.namespace),
    session.namespace ? button("Back to own", home, { class: "quiet" }) : "",
    session.key ? button("Forget key", leave, { class: "quiet" }) : "",
  );
}

/** A form for the key in the place of the view. */
function askForKey(problem) {
  leaving.abort();
  session.key = null;
  session.namespace = null;
  whose.replaceChildren();
  document.title = "API key · Memory";
  const input = el("input", {
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    "aria-invalid": problem ? "true" : null,
  });
  const use = (event) => {
    event.preventDefault();
    session.key = input.value.trim();
    enter();
  };
  main.replaceChildren(
    el("h1", { tabindex: "-1" }, "This server wants a key"),
    el(
      "form",
      { class: "key card", onsubmit: use },
      el("p", {}, "Whoever runs it makes one with ", el("code", {}, "kv-agent keys add NAMESPACE"), "."),
      field("API key", input, "It stays in this tab and goes when you close it."),
      problem ? el("p", { class: "trouble", role: "alert" }, `That key was not accepted: ${problem}`) : "",
      el("button", { type: "submit", class: "main" }, "Use key"),
    ),
  );
  main.removeAttribute("aria-busy");
  input.focus();
  return null;
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  main.focus();
});
addEventListener("hashchange", () => show(true));
show(false);
