"use strict";
// The filter of all tests. Without this script they are listed without one.
(() => {
  const table = document.getElementById("tests");
  if (!table) return;
  const filter = document.getElementById("filter");
  const bar = filter.parentElement;
  const boxes = [...bar.querySelectorAll("input[type=checkbox]")];
  const rows = [...table.rows].map((row) => ({ row, text: row.cells[1].textContent.toLowerCase(), outcome: row.className }));

  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const outcomes = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const { row, text, outcome } of rows) {
      const fits = outcomes.has(outcome) && words.every((word) => text.includes(word));
      row.classList.toggle("filtered", !fits);
      shown += fits;
    }
    document.getElementById("position").textContent = `${shown} of ${rows.length}`;
  }

  bar.hidden = false;
  for (const input of [filter, ...boxes]) input.addEventListener("input", narrow);
  narrow();
})();
