// A question to the memories: what would be retrieved, in which order, and why.

import { ask, given } from "./api.js";
import { bar, el, empty, field, select, table, to, toMemory } from "./dom.js";
import { some, score, took, when, who } from "./format.js";

const FUSION = 60; // hybrid adds up 1 / (60 + place), see docs/serving.md
const MODES = [
  ["hybrid", "both: words and keys"],
  ["latent", "the model's keys"],
  ["lexical", "words"],
];
const SHARES = [
  ["user", "all of the user's memories"],
  ["agent", "only the agent's"],
  ["session", "only the session's"],
];
const WAYS = { latent: "Model's keys", lexical: "Words", embedding: "Embedding" };

export async function queryView({ content, parameters, signal, guard }) {
  const value = (name, otherwise = "") => parameters.get(name) ?? otherwise;
  const text = (name, otherwise, placeholder) =>
    el("input", { type: "text", value: value(name, otherwise), placeholder, autocomplete: "off" });
  const time = (name) => el("input", { type: "datetime-local", value: value(name), step: 1 });
  const whole = (name, otherwise, least, most) =>
    el("input", { type: "number", min: least, max: most, value: value(name, otherwise), required: true });
  const inputs = {
    q: el("textarea", { rows: 3, required: true, maxlength: 32768 }, value("q")),
    user: text("user", "default"),
    top_k: whole("top_k", 5, 1, 100),
    mode: select(MODES, value("mode", "hybrid")),
    share: select(SHARES, value("share", "user")),
    agent: text("agent", "", "all"),
    session: text("session", "", "all"),
    since: time("since"),
    until: time("until"),
    metadata: el("textarea", { rows: 2, spellcheck: "false" }, value("metadata")),
    neighbours: whole("neighbours", 0, 0, 20),
  };
  inputs.user.required = true;
  const results = el("section", { class: "results", "aria-labelledby": "found" });
  const run = async () => {
    results.setAttribute("aria-busy", "true");
    try {
      const body = bodyOf(inputs);
      const started = performance.now();
      const answer = await ask("POST", "/query", { body, signal });
      drawResults(results, answer, body.mode, performance.now() - started);
    } catch (error) {
      const notice = guard(error, run);
      if (notice) results.replaceChildren(notice);
    }
    results.removeAttribute("aria-busy");
  };
  const submit = (event) => {
    event.preventDefault();
    const asked = Object.entries(inputs).map(([name, input]) => [name, input.value.trim()]);
    const address = to("query", Object.fromEntries(asked));
    if (address !== location.hash) history.pushState(null, "", address);
    run();
  };
  const narrowed = ["share", "agent", "session", "since", "until", "metadata", "neighbours"];
  content.replaceChildren(
    el(
      "form",
      { class: "card query", onsubmit: submit, "aria-label": "Query" },
      field("What would you ask?", inputs.q),
      el(
        "div",
        { class: "filters" },
        field("User", inputs.user),
        field("How many", inputs.top_k),
        field("Search by", inputs.mode),
      ),
      el(
        "details",
        { open: narrowed.some((name) => parameters.get(name)) },
        el("summary", {}, "Narrow it"),
        el(
          "div",
          { class: "filters" },
          field("Read", inputs.share),
          field("Agent", inputs.agent),
          field("Session", inputs.session),
          field("Stored since", inputs.since),
          field("Stored before", inputs.until),
          field("Turns beside each", inputs.neighbours),
          field("Metadata", inputs.metadata, 'one name=value per line; 5 and true as in JSON, "5" is a text'),
        ),
      ),
      el("button", { type: "submit", class: "main" }, "Query"),
    ),
    results,
  );
  if (inputs.q.value) await run();
  else results.append(empty("Nothing asked yet.", "Ask, and see which memories a chat would get, and why."));
}

function bodyOf(inputs) {
  const at = (input) => (input.value ? new Date(input.value).getTime() / 1000 : "");
  return {
    query: inputs.q.value,
    user_id: inputs.user.value.trim(),
    top_k: Number(inputs.top_k.value),
    mode: inputs.mode.value,
    share: inputs.share.value,
    ...given({ agent_id: inputs.agent.value.trim(), session_id: inputs.session.value.trim() }),
    neighbours: Number(inputs.neighbours.value),
    explain: true,
    peek: true,
    filters: given({
      agent_id: inputs.agent.value.trim(),
      session_id: inputs.session.value.trim(),
      since: at(inputs.since),
      until: at(inputs.until),
      metadata: metadataOf(inputs.metadata.value),
    }),
  };
}

function metadataOf(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  return Object.fromEntries(
    lines.map((line) => {
      const [name, ...rest] = line.split("=");
      const value = rest.join("=").trim();
      try {
        return [name.trim(), JSON.parse(value)];
      } catch {
        return [name.trim(), value];
      }
    }),
  );
}

function drawResults(results, answer, mode, waited) {
  const found = answer.memories.filter((one) => !one.neighbour_of);
  const beside = answer.memories.filter((one) => one.neighbour_of);
  const model = answer.probe_ms
    ? `, ${took(answer.probe_ms)} of it the model, which computed the query's keys`
    : "; the model was not asked";
  const parts = [
    el("h2", { id: "found", tabindex: "-1" }, some(found.length, "memory", "memories")),
    el(
      "p",
      { class: "quiet", role: "status" },
      `Found in ${took(answer.took_ms)}${model}. Here after ${took(waited)}.`,
    ),
  ];
  if (!found.length) {
    parts.push(empty("Nothing fits.", "Ask otherwise, ask another user's memories, or narrow it less."));
  } else {
    const best = Math.max(...found.map((one) => one.score));
    parts.push(el("ol", { class: "found" }, found.map((one, index) => hit(one, index + 1, mode, best))));
  }
  if (beside.length) {
    const turns = beside.map((one) => hit(one, null, mode, 0));
    parts.push(el("h2", {}, "Turns beside them"), el("ol", { class: "found" }, turns));
  }
  results.replaceChildren(...parts);
}

function hit(memory, place, mode, best) {
  const tokens = some(memory.tokens, "token");
  return el(
    "li",
    { class: "card hit" },
    el(
      "div",
      { class: "head" },
      place !== null && el("span", { class: "place", "aria-label": `Place ${place}` }, place),
      el("span", { class: "quiet" }, `${who(memory)} · ${tokens} · `, when(memory.created)),
      el("a", { href: toMemory(memory.id), "aria-label": `Open memory ${place ?? "beside"}` }, "Open"),
    ),
    el("p", { class: "text" }, memory.text || "(no text)"),
    place !== null && why(memory, mode, best),
  );
}

function why(memory, mode, best) {
  const ways = Object.entries(memory.voices);
  const columns = [
    { title: "Way", cell: ([way]) => WAYS[way] ?? way },
    { title: "Place", number: true, cell: ([, voice]) => voice.rank },
    { title: "Its own score", number: true, cell: ([, voice]) => score(voice.score) },
  ];
  if (mode === "hybrid") {
    const adds = ([, voice]) => `1/${FUSION + voice.rank} = ${score(1 / (FUSION + voice.rank))}`;
    columns.push({ title: "Adds", number: true, cell: adds });
  }
  return el(
    "div",
    { class: "why" },
    el(
      "div",
      { class: "score" },
      el("span", {}, "Score ", el("strong", {}, score(memory.score))),
      bar(best ? memory.score / best : 0, "Of the best score"),
    ),
    table("Why", columns, ways),
  );
}
