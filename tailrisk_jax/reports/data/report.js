"use strict";
(() => {
  const table = document.getElementById("queries");
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  const rows = Array.from(body.rows);
  const find = document.getElementById("find");
  const boxes = Array.from(document.querySelectorAll("#controls input[type=checkbox]"));
  const words = boxes.map((box) => box.value);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  const text = (row, column) =>
    row.cells[column].dataset.value ?? row.cells[column].textContent.toLowerCase();

  function compare(kind, column, sign) {
    if (kind === "text") return (a, b) => sign * text(a, column).localeCompare(text(b, column));
    const number = (row) => Number(row.cells[column].dataset.value);
    return (a, b) => {
      const [x, y] = [number(a), number(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y || 0);
    };
  }

  function sort(head, column) {
    const first = head.dataset.sort === "text" || column === 0 ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    rows.sort(compare(head.dataset.sort, column, order === "ascending" ? 1 : -1));
    body.append(...rows);
  }

  function filter() {
    const wanted = find.value.trim().toLowerCase();
    const allowed = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      const word = row.dataset.verdict;
      const open = (!words.includes(word) || allowed.has(word)) && texts.get(row).includes(wanted);
      row.hidden = !open;
      shown += open;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} shown`;
  }

  for (const [column, head] of heads.entries()) {
    if (!head.dataset.sort) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, column));
    head.append(button);
  }
  find.addEventListener("input", filter);
  for (const box of boxes) box.addEventListener("change", filter);
  document.getElementById("controls").hidden = false;
  filter();
})();
