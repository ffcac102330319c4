// One memory: what it says, whose it is, and the chunks of KV that it is kept as.

import { ask, get, memoryPath } from "./api.js";
import { chunkStrip } from "./charts.js";
import { button, el, empty, facts, table, to } from "./dom.js";
import { bytes, count, line, some, when } from "./format.js";

export async function memoryView({ content, id, signal, say, guard }) {
  const path = memoryPath(id);
  const draw = async () => {
    const [memory, { chunks }] = await Promise.all([
      get(path, undefined, signal),
      get(`${path}/chunks`, undefined, signal),
    ]);
    content.replaceChildren(
      el(
        "div",
        { class: "head" },
        el("a", { href: to("memories", { user: memory.user_id }) }, `All memories of ${memory.user_id}`),
        actions(memory),
      ),
      el("section", { "aria-label": "Text" }, el("p", { class: "card text" }, memory.text || "(no text)")),
      about(memory),
      chunkSection(chunks),
    );
  };
  const actions = (memory) => {
    const act = (work) => async () => {
      try {
        await work();
      } catch (error) {
        content.prepend(guard(error) ?? "");
      }
    };
    const pin = act(async () => {
      await ask(memory.pinned ? "DELETE" : "PUT", `${path}/pin`, { signal });
      await draw();
      say(memory.pinned ? "The memory may go again as any other." : "The memory is kept whatever happens.");
      content.querySelector(".actions button").focus();
    });
    const forget = act(async () => {
      if (!(await confirmed(memory))) return;
      await ask("DELETE", path, { signal });
      location.hash = to("memories", { user: memory.user_id });
      say("The memory is forgotten.");
    });
    return el(
      "div",
      { class: "actions" },
      button(memory.pinned ? "Unpin" : "Pin", pin, { title: "Pinned, it stays whatever the limits are" }),
      button("Forget", forget, { class: "danger" }),
    );
  };
  await draw();
}

/** Whether somebody really wants it gone. */
function confirmed(memory) {
  return new Promise((resolve) => {
    const close = (answer) => () => {
      dialog.returnValue = answer;
      dialog.close();
    };
    const dialog = el(
      "dialog",
      { "aria-labelledby": "forget-title", "aria-describedby": "forget-text" },
      el("h2", { id: "forget-title" }, "Forget this memory?"),
      el("p", { id: "forget-text" }, `“${line(memory.text, 120)}” goes for good, with its KV.`),
      el(
        "div",
        { class: "actions" },
        button("Keep it", close("")),
        button("Forget it", close("forget"), { class: "danger" }),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "forget");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

function about(memory) {
  const ends = memory.expires === null ? "never by itself" : when(memory.expires);
  const metadata = Object.entries(memory.metadata).map(([name, value]) => [name, String(value)]);
  const pairs = [
    ["User", memory.user_id],
    ["Agent", memory.agent_id ?? "none"],
    ["Session", memory.session_id ?? "none"],
    ["Tokens", count(memory.tokens)],
    ["Stored", when(memory.created)],
    ["Forgotten", memory.pinned ? "never, it is pinned" : ends],
    ["Id", el("code", {}, memory.id)],
    ...metadata,
  ];
  const heading = el("h2", { id: "about" }, "About");
  return el("section", { class: "card", "aria-labelledby": "about" }, heading, facts(pairs));
}

function chunkSection(chunks) {
  const section = el("section", { "aria-labelledby": "chunks" }, el("h2", { id: "chunks" }, "Chunks"));
  if (!chunks.length) {
    section.append(empty("This memory has no chunks."));
    return section;
  }
  const total = chunks.reduce((sum, chunk) => sum + chunk.bytes, 0);
  section.append(
    el(
      "p",
      { class: "quiet" },
      `${some(chunks.length, "chunk")}, ${bytes(total)} on disk. How many chunks are in memory, too, is `,
      "among the engine's metrics: kv_agent_tier_chunks.",
    ),
    chunkStrip(chunks),
    table(
      "Chunks",
      [
        {
          title: "Chunk",
          cell: (chunk) => [
            el("span", { class: "clamp" }, line(chunk.text, 120) || "(only special tokens)"),
            chunk.damaged && el("span", { class: "badge bad" }, "damaged: will be computed"),
          ],
        },
        { title: "Tokens", number: true, cell: (chunk) => count(chunk.tokens) },
        { title: "From token", number: true, cell: (chunk) => count(chunk.start) },
        { title: "Position in its prompt", number: true, cell: (chunk) => count(chunk.position) },
        { title: "On disk", number: true, cell: (chunk) => bytes(chunk.bytes) },
        { title: "Codec", cell: (chunk) => chunk.codec },
        {
          title: "Shared",
          cell: ({ other_memories: others }) => (others ? `with ${count(others)} more` : "no"),
        },
      ],
      chunks,
    ),
  );
  return section;
}
