"use strict";
// Sorts a table by the column whose title is pressed: upwards, downwards, then as it was.
// A cell's data-sort stands for its text; an empty one is a missing value, which stays at the end.
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  const keyOf = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const compare = (one, other) => {
    const [a, b] = [Number(one), Number(other)];
    if (!isNaN(a) && !isNaN(b)) return a - b;
    if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;
    return one.localeCompare(other, "en", { numeric: true });
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      const known = rows.filter((row) => keyOf(row, column) !== "");
      const missing = rows.filter((row) => keyOf(row, column) === "");
      const sign = order === "descending" ? -1 : 1;
      known.sort((a, b) => sign * compare(keyOf(a, column), keyOf(b, column)));
      table.tBodies[0].append(...(order ? [...known, ...missing] : rows));
    });
  });
  table.classList.add("sortable");
}
// On paper nothing can be opened.
for (const [event, open] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    for (const details of document.querySelectorAll(open ? "details:not([open])" : "details[data-closed]")) {
      details.open = open;
      details.toggleAttribute("data-closed", open);
    }
  });
}
