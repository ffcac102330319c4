// The memories of a user, agent or session, newest first, or those with the words one types.

import { ask, get, given } from "./api.js";
import { button, el, empty, field, select, table, to, toMemory } from "./dom.js";
import { count, line, score, some, when } from "./format.js";

const PAUSE_MS = 250; // of typing, before a search begins
const MODES = [
  ["lexical", "by words"],
  ["hybrid", "by words and the model's keys"],
];

export async function memoriesView({ content, parameters, signal, guard }) {
  const known = await get("/users", { limit: 100 }, signal);
  const chosen = {
    user: parameters.get("user") ?? known.users.find((one) => one.memories)?.user_id ?? "default",
    agent: parameters.get("agent") ?? "",
    session: parameters.get("session") ?? "",
    q: parameters.get("q") ?? "",
    mode: parameters.get("mode") ?? "lexical",
  };
  const text = (name, attributes) =>
    el("input", { type: "text", value: chosen[name], autocomplete: "off", ...attributes });
  const inputs = {
    q: text("q", { type: "search", spellcheck: "false", maxlength: 2000 }),
    mode: select(MODES, chosen.mode),
    user: text("user", { list: "known-users", required: true }),
    agent: text("agent", { placeholder: "all" }),
    session: text("session", { placeholder: "all" }),
  };
  const stay = (event) => event.preventDefault(); // typing searches already
  const results = el("div", { class: "results" });
  const summary = el("p", { class: "quiet", role: "status" });
  content.replaceChildren(
    el(
      "form",
      { class: "card filters", role: "search", "aria-label": "Memories", onsubmit: stay },
      field("Search", inputs.q),
      field("Search how", inputs.mode),
      field("User", inputs.user),
      field("Agent", inputs.agent),
      field("Session", inputs.session),
      el("datalist", { id: "known-users" }, known.users.map((one) => el("option", { value: one.user_id }))),
    ),
    summary,
    results,
  );

  let running = new AbortController();
  const load = async () => {
    running.abort();
    running = new AbortController();
    const now = AbortSignal.any([running.signal, signal]);
    for (const [name, input] of Object.entries(inputs)) chosen[name] = input.value.trim();
    history.replaceState(null, "", to("memories", { ...chosen, mode: chosen.q ? chosen.mode : "" }));
    results.setAttribute("aria-busy", "true");
    try {
      await (chosen.q ? search : list)(chosen, { results, summary, signal: now, guard });
    } catch (error) {
      if (now.aborted) return;
      summary.textContent = "";
      results.replaceChildren(guard(error, load) ?? "");
    }
    results.removeAttribute("aria-busy");
  };
  let waiting;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(load, PAUSE_MS);
  };
  signal.addEventListener("abort", () => clearTimeout(waiting));
  for (const input of Object.values(inputs)) input.addEventListener("input", soon);
  await load();
}

async function search(chosen, { results, summary, signal }) {
  const body = {
    query: chosen.q,
    mode: chosen.mode,
    top_k: 30,
    peek: true,
    user_id: chosen.user || "default",
    filters: given({ agent_id: chosen.agent, session_id: chosen.session }),
  };
  const found = await ask("POST", "/query", { body, signal });
  const number = some(found.memories.length, "memory", "memories");
  summary.textContent = `${number} found for ${chosen.user}, best first`;
  results.replaceChildren(
    found.memories.length
      ? memoryTable(found.memories, true)
      : empty("Nothing has these words.", "Try others, or search by the model's keys, too."),
  );
}

async function list(chosen, { results, summary, signal, guard }) {
  const whose = given({ user_id: chosen.user, agent_id: chosen.agent, session_id: chosen.session });
  const first = await get("", { ...whose, limit: 50 }, signal);
  results.replaceChildren();
  if (!first.memories.length) {
    summary.textContent = "";
    results.append(
      empty(
        `${chosen.user || "default"} has no memories ${chosen.agent || chosen.session ? "there" : "yet"}.`,
        "Chats with the field ",
        el("code", {}, "memory"),
        " store their turns; the overview names the users that have some.",
      ),
    );
    return;
  }
  let shown = 0;
  const append = (page) => {
    shown += page.memories.length;
    const all = page.next ? "the newest" : "all";
    summary.textContent = `${some(shown, "memory", "memories")} of ${chosen.user}, ${all}, newest first`;
    results.append(memoryTable(page.memories, false));
    if (!page.next) return;
    const more = button("More", async () => {
      more.disabled = true;
      try {
        const next = await get("", { ...whose, limit: 50, cursor: page.next }, signal);
        more.remove();
        append(next);
      } catch (error) {
        more.replaceWith(guard(error) ?? "");
      }
    });
    results.append(more);
  };
  append(first);
}

function memoryTable(memories, scored) {
  const columns = [
    {
      title: "Memory",
      cell: (one) => [
        el("a", { href: toMemory(one.id), class: "clamp" }, line(one.text) || "(no text)"),
        one.pinned && el("span", { class: "badge" }, "pinned"),
      ],
    },
    { title: "Agent", cell: (one) => one.agent_id ?? "–" },
    { title: "Session", cell: (one) => one.session_id ?? "–" },
    { title: "Tokens", number: true, cell: (one) => count(one.tokens) },
    { title: "Stored", cell: (one) => when(one.created) },
  ];
  if (scored) columns.splice(1, 0, { title: "Score", number: true, cell: (one) => score(one.score) });
  return table("Memories", columns, memories);
}
