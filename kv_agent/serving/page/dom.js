// Elements by name. Texts only ever become text nodes, so that nothing somebody stored becomes markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, listeners (`onclick`, …) and children; null and false are left out. */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same, as part of a drawing. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (!isThere(value)) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(isThere));
  return node;
}

const isThere = (value) => value !== undefined && value !== null && value !== false;

/** The address of a view within the page; empty parameters are left out. */
export function to(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => isThere(value) && value !== "");
  const query = new URLSearchParams(given).toString();
  return `#/${path}${query ? `?${query}` : ""}`;
}

/** The address of one memory's view. */
export const toMemory = (id) => to(`memory/${encodeURIComponent(id)}`);

/** A button that says what it does. */
export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

let fields = 0;

/** A labelled input, select or textarea; `hint` says more. */
export function field(label, control, hint) {
  const id = `field-${++fields}`;
  control.id = id;
  if (hint) control.setAttribute("aria-describedby", `${id}-hint`);
  return el(
    "div",
    { class: "field" },
    el("label", { for: id }, label),
    control,
    hint && el("small", { id: `${id}-hint` }, hint),
  );
}

/** A select with options `[value, text]`. */
export function select(options, chosen, attributes = {}) {
  return el(
    "select",
    attributes,
    options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)),
  );
}

/**
 * A table of `columns` (`{title, cell, number}`), whose rows are cards on a phone. The roles are said again
 * because a table that is laid out otherwise is none to a screen reader.
 */
export function table(caption, columns, rows) {
  const cell = (row) => (column, index) => {
    const attributes = {
      role: index ? "cell" : "rowheader",
      "data-label": column.title,
      class: column.number && "number",
    };
    if (!index) attributes.scope = "row";
    return el(index ? "td" : "th", attributes, el("div", { class: "cell" }, column.cell(row)));
  };
  return el(
    "table",
    { role: "table" },
    el("caption", { class: "hidden" }, caption),
    el(
      "thead",
      { role: "rowgroup" },
      el(
        "tr",
        { role: "row" },
        columns.map((column) =>
          el("th", { role: "columnheader", scope: "col", class: column.number && "number" }, column.title),
        ),
      ),
    ),
    el(
      "tbody",
      { role: "rowgroup" },
      rows.map((row) => el("tr", { role: "row" }, columns.map(cell(row)))),
    ),
  );
}

/** Pairs of a name and what it is, as a list. */
export function facts(pairs) {
  const fact = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  return el("dl", { class: "facts" }, pairs.map(fact));
}

/** How much of a whole something is, `share` from 0 to 1; `name` says of what, `kind` is a class. */
export function bar(share, name, kind = "") {
  const width = 100 * Math.max(0, Math.min(share, 1));
  return svg(
    "svg",
    {
      class: `bar ${kind}`,
      viewBox: "0 0 100 1",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `${name}: ${Math.round(width)} %`,
    },
    svg("rect", { class: "whole", width: 100, height: 1 }),
    svg("rect", { class: "part", width, height: 1 }),
  );
}

/** What to do where there is nothing to see. */
export function empty(title, ...advice) {
  const what = el("p", {}, el("strong", {}, title));
  return el("div", { class: "empty" }, what, advice.length > 0 && el("p", {}, advice));
}

/** What went wrong, as the server says it. */
export function trouble(error, retry) {
  return el(
    "div",
    { class: "trouble", role: "alert" },
    el("p", {}, error.message),
    retry && button("Try again", retry),
  );
}
