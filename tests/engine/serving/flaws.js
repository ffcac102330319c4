// What a screen reader would miss or stumble over, in words.
() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const ids = (node, name) => (node.getAttribute(name) ?? "").split(" ").filter(Boolean);
  const textOf = (id) => document.getElementById(id)?.textContent ?? "";
  const name = (node) => node.getAttribute("aria-label") || ids(node, "aria-labelledby").map(textOf).join("");
  const flaws = [];
  const check = (nodes, flaw, isFlawed) =>
    flaws.push(...nodes.filter(isFlawed).map((node) => `${flaw}: ${node.outerHTML.slice(0, 200)}`));
  const once = (selector) => all(selector).length === 1 || flaws.push(`${all(selector).length} ${selector}`);

  check(all("input, select, textarea"), "no label", (node) => !node.labels[0]?.textContent.trim());
  check(all("button, a, summary"), "no name", (node) => !(name(node) || node.textContent.trim()));
  check(all("dialog, nav, [role=img], [role=log], section"), "no name", (node) => !name(node).trim());
  check(all("svg"), "no image and not hidden", (node) => {
    return node.getAttribute("role") !== "img" && !node.closest("[aria-hidden=true]");
  });
  check(all("table"), "no caption", (node) => !node.caption?.textContent);
  for (const attribute of ["aria-labelledby", "aria-describedby", "for", "list"]) {
    check(all(`[${attribute}]`), `${attribute} leads nowhere`, (node) => {
      return ids(node, attribute).some((id) => !document.getElementById(id));
    });
  }
  check(all("[id]"), "an id twice", (node) => all(`[id="${CSS.escape(node.id)}"]`).length > 1);
  check(all("h1, h2, h3"), "skips a level", (node) => {
    const headings = all("h1, h2, h3");
    const before = headings[headings.indexOf(node) - 1];
    return Number(node.tagName[1]) > Number(before?.tagName[1] ?? 0) + 1;
  });
  check(all("[tabindex]"), "an order of its own", (node) => node.tabIndex > 0);
  ["h1", "main", "header", "nav", "html[lang=en]", "nav [aria-current=page]"].forEach(once);
  return flaws;
};
