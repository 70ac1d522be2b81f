// Tables sort by a click on a column's head and show the rows that have all words of the filter.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => sign * compare(a.cells[column], b.cells[column])));
    });
  });

  const box = table.closest("div").previousElementSibling;
  if (box?.matches(".filter")) {
    box.querySelector("input").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/);
      for (const row of body.rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
      const shown = [...body.rows].filter((row) => !row.hidden).length;
      box.querySelector("[role=status]").textContent = `${shown} rows`;
    });
  }
}

// Numbers by size, empty cells last, all else as text.
function compare(a, b) {
  const [x, y] = [a, b].map((cell) => ("sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent));
  if (typeof x === typeof y && typeof x === "number") return x - y;
  if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
  return x.localeCompare(y, "en", { numeric: true });
}

// What scrolls sideways can be reached by the keyboard.
for (const box of document.querySelectorAll(".wide, .output_area, .input_area, pre")) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
}
