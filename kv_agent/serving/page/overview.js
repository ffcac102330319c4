// What a namespace holds and may hold, how the server is, and who has memories.

import { get, session } from "./api.js";
import { bar, button, el, empty, facts, table, to } from "./dom.js";
import { bytes, count, some, span, when } from "./format.js";

export async function overviewView({ content, signal, stats, guard, again, say }) {
  const health = get("/health", undefined, signal);
  const users = get("/users", { limit: 50 }, signal);
  const now = await get("/stats", undefined, signal);
  content.replaceChildren(kept(now), limits(now));
  content.append(healthSection(await health));
  if (stats.store) content.append(await namespacesSection(now.namespace, { signal, guard, again, say }));
  content.append(usersSection(await users, { signal, guard }));
  if (now.store) content.append(storeSection(now.store));
}

function kept(stats) {
  const { limits } = stats;
  return el(
    "section",
    { class: "tiles", "aria-label": "What is kept" },
    tile("Memories", stats.memories, limits.max_memories, count),
    tile("Tokens", stats.tokens, limits.max_tokens, count),
    tile("On disk", stats.bytes, limits.max_bytes, bytes),
  );
}

function tile(name, number, limit, format) {
  return el(
    "div",
    { class: "tile" },
    el("h2", {}, name),
    el("p", { class: "figure" }, format(number)),
    limit !== null && bar(number / limit, `${name}, of the limit`, number > 0.9 * limit ? "full" : ""),
    el("p", { class: "quiet" }, limit === null ? "no limit" : `of ${format(limit)}`),
  );
}

function limits({ limits, evicted, refused }) {
  const rate = limits.requests_per_minute;
  return el(
    "section",
    { class: "card", "aria-labelledby": "limits" },
    el("h2", { id: "limits" }, "Limits"),
    facts([
      ["Who goes first", limits.policy ?? "as the server is set"],
      ["Kept of a session", limits.window_tokens === null ? "all" : some(limits.window_tokens, "token")],
      ["Forgotten after", limits.ttl_s === null ? "never" : span(limits.ttl_s)],
      ["Requests", rate === null ? "no limit" : `${count(rate)} a minute`],
      ["Went to make room", count(evicted)],
      ["Too large to keep", count(refused)],
    ]),
  );
}

function healthSection(health) {
  const lag = health.index_lag;
  const line = (good, text) => el("li", { class: good ? "good" : "bad" }, text);
  return el(
    "section",
    { class: "card", "aria-labelledby": "health" },
    el("h2", { id: "health" }, "Health"),
    el(
      "ul",
      { class: "checks" },
      line(health.engine, health.engine ? "The engine answers" : "The engine does not answer"),
      line(health.store, health.store ? "The store can be written" : "The store cannot be written"),
      line(true, lag ? `${some(lag, "change")} for the next search to follow` : "Indexes are up to date"),
    ),
  );
}

async function namespacesSection(here, { signal, guard, again, say }) {
  const heading = el("h2", { id: "namespaces" }, "Namespaces");
  const section = el("section", { "aria-labelledby": "namespaces" }, heading);
  const look = (namespace) => () => {
    session.namespace = namespace;
    say(`Now looking into ${namespace}.`);
    again();
  };
  const columns = [
    { title: "Namespace", cell: (one) => one.namespace },
    { title: "Memories", number: true, cell: (one) => count(one.memories) },
    { title: "Tokens", number: true, cell: (one) => count(one.tokens) },
    { title: "On disk", number: true, cell: (one) => bytes(one.bytes) },
    {
      title: "This page",
      cell: ({ namespace }) => {
        if (namespace === here) return "shows this one";
        return button("Look into", look(namespace), { "aria-label": `Look into ${namespace}` });
      },
    },
  ];
  await paged(section, { signal, guard }, "/namespaces", {}, (page) => {
    if (page.namespaces.length) return table("Namespaces", columns, page.namespaces);
    return empty("No namespace holds anything yet.");
  });
  return section;
}

/** Append a page of a list to a section, and a button for the next one. */
async function paged(section, { signal, guard }, path, parameters, draw, first) {
  const page = first ?? (await get(path, { ...parameters, limit: 50 }, signal));
  section.append(...[draw(page)].flat());
  if (!page.next) return;
  const more = button("More", async () => {
    more.disabled = true;
    try {
      await paged(section, { signal, guard }, path, { ...parameters, cursor: page.next }, draw);
    } catch (error) {
      section.append(guard(error) ?? "");
    }
    more.remove();
  });
  section.append(more);
}

function usersSection(first, context) {
  const heading = el("h2", { id: "users" }, "Users, agents and sessions");
  const section = el("section", { "aria-labelledby": "users" }, heading);
  if (!first.users.length) {
    section.append(
      empty(
        "Nobody has a memory here yet.",
        "Send a chat with the field ",
        el("code", {}, "memory"),
        " or a turn to ",
        el("code", {}, "POST /memory/store"),
        ", and it appears here.",
      ),
    );
    return section;
  }
  const draw = (page) => page.users.map((user) => userDetails(user, context));
  paged(section, context, "/users", {}, draw, first);
  return section;
}

function userDetails(user, context) {
  const inside = el("div", { class: "inside" });
  const load = async () => {
    if (!details.open || inside.hasChildNodes()) return;
    const name = user.user_id;
    inside.append(el("p", {}, el("a", { href: to("memories", { user: name }) }, `All memories of ${name}`)));
    try {
      await paged(inside, context, "/sessions", { user_id: name }, (page) => sessions(name, page.sessions));
    } catch (error) {
      inside.append(context.guard(error) ?? "");
    }
  };
  const details = el(
    "details",
    { class: "card user", ontoggle: load },
    el(
      "summary",
      {},
      el("span", { class: "name" }, user.user_id),
      el(
        "span",
        { class: "quiet" },
        `${some(user.memories, "memory", "memories")} · ${some(user.tokens, "token")}`,
        user.newest !== null && [" · newest ", when(user.newest)],
      ),
    ),
    inside,
  );
  return details;
}

function sessions(user, rows) {
  const link = (one) => to("memories", { user, agent: one.agent_id, session: one.session_id });
  const name = (one) => [one.agent_id ?? "no agent", one.session_id ?? "no session"].join(" / ");
  return table(
    `Agents and sessions of ${user}`,
    [
      { title: "Agent / session", cell: (one) => el("a", { href: link(one) }, name(one)) },
      { title: "Memories", number: true, cell: (one) => count(one.memories) },
      { title: "Tokens", number: true, cell: (one) => count(one.tokens) },
      { title: "Newest", cell: (one) => when(one.newest) },
    ],
    rows,
  );
}

function storeSection(store) {
  const words = (name) => name.replaceAll("_", " ");
  const value = (name, number) => (/bytes|limit/.test(name) ? bytes(number) : count(number));
  return el(
    "section",
    { "aria-label": "The whole store" },
    el(
      "details",
      { class: "card" },
      el(
        "summary",
        {},
        el("span", { class: "name" }, "The whole store"),
        el("span", { class: "quiet" }, "all namespaces together"),
      ),
      facts(Object.entries(store).map(([name, number]) => [words(name), value(name, number)])),
    ),
  );
}
