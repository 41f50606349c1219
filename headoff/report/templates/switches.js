// A switch for each head: all subsets are on the page, so what every switch would do next is known.
(() => {
  const source = document.getElementById("switches-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const board = document.getElementById("board");
  const switches = [...board.querySelectorAll("[role=switch]")];
  const rows = [...board.querySelectorAll("tbody tr")];
  const after = (step, bit) => data.steps[data.subsets[step] ^ (1 << bit)];
  const turn = (bit) => page.set({ step: after(page.state.step, bit) });
  const change = (number, decimals) => {
    const text = Math.abs(number).toFixed(decimals);
    return Number(text) === 0 ? "0" : `${number > 0 ? "+" : "−"}${text}`;
  };
  const badge = (letter, changed) => {
    const made = document.createElement("b");
    made.textContent = letter;
    made.style.background = changed ? data.letters[letter][1] : "";
    made.className = changed ? "changed" : "";
    return made;
  };

  function showObject(row, o, step) {
    const status = data.statuses[step][o];
    const probability = data.probabilities[step][o];
    row.querySelector(".now").replaceChildren(badge(status, true), ` ${probability.toFixed(2)}`);
    row.querySelectorAll("td.next").forEach((cell, bit) => {
      const then = after(step, bit);
      const [letter, will] = [data.statuses[then][o], data.probabilities[then][o]];
      const by = change(will - probability, 2);
      cell.replaceChildren(badge(letter, letter !== status), ` ${by}`);
      cell.classList.toggle("same", letter === status && by === "0");
      const turned = `H${data.heads[bit]} ${data.subsets[step] >> bit & 1 ? "on" : "off"}`;
      const words = letter === status ? `still ${data.letters[status][0]}` : `${data.letters[status][0]} → ${data.letters[letter][0]}`;
      cell.title = `${turned}: ${row.dataset.name} ${words}, probability ${probability.toFixed(3)} → ${will.toFixed(3)}`;
    });
  }

  function showCount(row, counts, step) {
    row.querySelector(".now").textContent = counts[step];
    row.querySelectorAll("td.next").forEach((cell, bit) => {
      const then = after(step, bit);
      cell.textContent = change(counts[then] - counts[step], 0);
      cell.classList.toggle("same", counts[then] === counts[step]);
      cell.title = `${row.dataset.name}: ${counts[step]} → ${counts[then]}`;
    });
  }

  page.followers.push(({ step }) => {
    switches.forEach((button, bit) => button.setAttribute("aria-checked", !(data.subsets[step] >> bit & 1)));
    rows.forEach((row, o) => {
      if (o < data.objects) showObject(row, o, step);
      else showCount(row, data[row.dataset.count], step);
    });
  });
  switches.forEach((button, bit) => button.addEventListener("click", () => turn(bit)));
  for (const row of rows) row.querySelectorAll("td.next").forEach((cell, bit) => cell.addEventListener("click", () => turn(bit)));
  data.heads.forEach((head, bit) => {
    if (head < 10) page.keys[head] = () => turn(bit);
  });
  page.keys["+"] = () => page.set({ step: data.steps[0] });
  page.keys["-"] = () => page.set({ step: data.steps.at(-1) });
})();
