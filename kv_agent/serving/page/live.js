// What happens now: events as they come, and what the last requests reused.

import { get, streamAddress } from "./api.js";
import { legend, reused, shareLine, tokenBars } from "./charts.js";
import { button, el, empty, table, toMemory } from "./dom.js";
import { count, percent, shortId, some, timeOfDay, took, who } from "./format.js";

const KEPT = 200; // events on the page
const LONGEST_WAIT_S = 30; // between two attempts to connect
const POLL_MS = 30_000; // for requests that told no event
const SETTLE_MS = 300; // events of one request come together

export async function liveView({ content, signal, guard }) {
  const charts = el("div", { class: "charts" });
  const state = el("p", { class: "state", role: "status" });
  const events = el("ol", { class: "events", role: "log", "aria-label": "Events", tabindex: "0" });
  const waiting = [];
  let paused = false;
  const nothing = empty("No event since you came here.", "Chat with memory, and it shows up.");

  const add = (event) => {
    nothing.remove();
    events.prepend(eventItem(event));
    while (events.children.length > KEPT) events.lastChild.remove();
  };
  const arrived = (event) => {
    if (paused) {
      waiting.push(event);
      if (waiting.length > KEPT) waiting.shift();
      pause.textContent = `Resume (${waiting.length} new)`;
    } else {
      add(event);
    }
    refreshSoon();
  };
  const pause = button("Pause", () => {
    paused = !paused;
    waiting.splice(0).forEach(add);
    pause.textContent = paused ? "Resume" : "Pause";
    pause.setAttribute("aria-pressed", String(paused));
  }, { "aria-pressed": "false" });
  const clear = button("Clear", () => events.replaceChildren());

  const refresh = async () => {
    try {
      const { requests } = await get("/requests", { limit: 100 }, signal);
      drawCharts(charts, requests.reverse());
    } catch (error) {
      const notice = guard(error, refresh);
      if (notice) charts.replaceChildren(notice);
    }
  };
  let settling;
  const refreshSoon = () => {
    clearTimeout(settling);
    settling = setTimeout(refresh, SETTLE_MS);
  };
  const polling = setInterval(() => document.hidden || refresh(), POLL_MS);
  signal.addEventListener("abort", () => {
    clearTimeout(settling);
    clearInterval(polling);
  });

  content.replaceChildren(
    el(
      "section",
      { "aria-labelledby": "reuse" },
      el("h2", { id: "reuse" }, "Reuse of recent requests"),
      charts,
    ),
    el(
      "section",
      { "aria-labelledby": "events" },
      el(
        "div",
        { class: "head" },
        el("h2", { id: "events" }, "Events"),
        state,
        el("div", { class: "actions" }, pause, clear),
      ),
      nothing,
      events,
    ),
  );
  await refresh();
  if (!signal.aborted) connect(arrived, (text, kind) => {
    state.textContent = text;
    state.dataset.kind = kind;
    if (kind === "good") refreshSoon(); // what was missed while there was no connection
  }, signal);
}

/** Listen until `signal`; after a break try again, ever more slowly. */
function connect(arrived, tell, signal) {
  let failures = 0;
  let timer;
  let socket;
  const open = () => {
    tell("Connecting…", "wait");
    socket = new WebSocket(streamAddress());
    socket.onopen = () => {
      failures = 0;
      tell("Connected", "good");
    };
    socket.onmessage = (message) => arrived(JSON.parse(message.data));
    socket.onclose = () => {
      if (signal.aborted) return;
      const wait = Math.min(LONGEST_WAIT_S, 2 ** failures++) * (0.75 + Math.random() / 2);
      tell(`Disconnected, trying again in ${Math.ceil(wait)} s`, "bad");
      timer = setTimeout(open, wait * 1000);
    };
  };
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    socket?.close();
  });
  open();
}

function eventItem(event) {
  if (event.event === "lost") {
    const missed = `${some(event.count, "event")} came faster than they could be sent`;
    return el("li", {}, el("span", { class: "badge bad" }, "missed"), el("span", { class: "what" }, missed));
  }
  const more = event.ids.length - 3;
  const gone = event.event === "evicted" || event.event === "forgotten";
  const ids = event.ids.slice(0, 3).map((id) => {
    if (gone) return [el("code", {}, shortId(id)), " "];
    return [el("a", { href: toMemory(id), class: "id" }, shortId(id)), " "];
  });
  return el(
    "li",
    {},
    el("span", { class: `badge ${event.event}` }, event.event),
    el("span", { class: "what" }, ids, more > 0 && `and ${count(more)} more `, details(event)),
    el("span", { class: "quiet" }, who(event), " · ", timeOfDay(event.at)),
  );
}

function details(event) {
  if (event.event === "retrieved") return `by a ${event.mode} search in ${took(event.took_ms)}`;
  if (event.event !== "injected") return "";
  const { exact, adapted, computed } = event; // null where the engine did not say
  return `${count((exact ?? 0) + (adapted ?? 0))} tokens put back, ${count(computed ?? 0)} computed`;
}

function drawCharts(charts, requests) {
  if (!requests.length) {
    charts.replaceChildren(
      empty(
        "No request with memory yet.",
        "Send a chat with the field ",
        el("code", {}, "memory"),
        ". Those that this server process answers since its start are drawn here, the last hundred.",
      ),
    );
    return;
  }
  const open = charts.querySelector("details")?.open ?? false;
  charts.replaceChildren(
    el(
      "div",
      { class: "pair" },
      chart("Prompt tokens of each request", tokenBars(requests), legend()),
      chart("Share of prompt tokens put back", shareLine(requests)),
    ),
    el(
      "details",
      { class: "card", open },
      el("summary", {}, "The same as a table"),
      requestTable(requests.toReversed()),
    ),
  );
}

const chart = (title, ...parts) => el("figure", { class: "card" }, el("figcaption", {}, title), parts);

function requestTable(requests) {
  const number = (name) => ({ title: name, number: true, cell: (one) => count(one[name]) });
  return table(
    "Recent requests",
    [
      { title: "Time", cell: (one) => timeOfDay(one.at) },
      { title: "Whose", cell: who },
      { title: "memories", number: true, cell: (one) => (one.failed ? "failed" : count(one.ids.length)) },
      ...["exact", "adapted", "local", "computed"].map(number),
      { title: "put back", number: true, cell: (one) => percent(reused(one)) },
      { title: "recall", number: true, cell: (one) => took(one.recall_ms) },
    ],
    requests,
  );
}
