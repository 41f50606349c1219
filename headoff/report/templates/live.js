// The live page: what is switched goes to the server, and boxes and maps come back.
(() => {
  const about = JSON.parse(document.getElementById("live-data").textContent);
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const { state } = page;
  // Of every site (layers x heads), and the text that says so.
  let gates = Object.fromEntries(Object.entries(about.sites).map(([site, [layers, heads]]) => [site, Array.from({ length: layers }, () => Array(heads).fill(1))]));
  let gatesOf = "none";
  let layOutOf = null; // the site whose grid is there
  let answer = null;

  function element(kind, name, ...inside) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    made.append(...inside);
    return made;
  }

  // Text of a configuration: heads that are alike in all layers first, then layer by layer.
  function textOf() {
    const statements = [];
    const amount = (gate) => (gate === 0 ? "" : `=${gate}`);
    for (const [site, rows] of Object.entries(gates)) {
      if (!rows.length) continue;
      const items = [];
      const columns = rows[0].map((gate, head) => gate !== 1 && rows.every((row) => row[head] === gate));
      if (rows.every((row) => row.every((gate) => gate === 0))) items.push("all");
      else {
        const grouped = (heads, row, prefix) => {
          for (const gate of new Set(heads.map((head) => row[head]))) {
            const alike = heads.filter((head) => row[head] === gate);
            items.push(`${prefix}${prefix && alike.length === row.length ? "" : `H${alike.join("+")}`}${amount(gate)}`);
          }
        };
        grouped(rows[0].flatMap((_, head) => (columns[head] ? [head] : [])), rows[0], "");
        rows.forEach((row, layer) => grouped(row.flatMap((gate, head) => (gate !== 1 && !columns[head] ? [head] : [])), row, `L${layer}`));
      }
      if (items.length) statements.push((site === "decoder_cross" ? "" : `${site} `) + items.join(","));
    }
    return statements.join("; ") || "none";
  }

  function turn(change) {
    gates = structuredClone(gates);
    change(gates[state.site]);
    gatesOf = textOf();
    page.set({ off: gatesOf });
  }
  // As a group: off if all of it is on, else on.
  const toggle = (places) => turn((rows) => {
    const to = places.every(([layer, head]) => rows[layer][head] === 1) ? 0 : 1;
    for (const [layer, head] of places) rows[layer][head] = to;
  });
  const everywhere = () => gates[state.site].flatMap((row, layer) => row.map((_, head) => [layer, head]));
  const toggleHead = (head) => toggle(everywhere().filter((place) => place[1] === head));
  const setAll = (gate) => turn((rows) => rows.forEach((row) => row.fill(gate)));

  function buildGrid() {
    layOutOf = state.site;
    const [layers, heads] = about.sites[state.site];
    const button = (text, label, click) => {
      const made = element("button", "", text);
      Object.assign(made, { type: "button", title: label });
      made.setAttribute("aria-label", label);
      made.addEventListener("click", click);
      return made;
    };
    const head = element("tr", "", element("th"));
    for (let h = 0; h < heads; h++) head.append(element("th", "", button(`H${h}`, `head ${h} in all layers`, () => toggleHead(h))));
    const body = element("tbody");
    for (let l = 0; l < layers; l++) {
      const row = element("tr", "", element("th", "", button(`L${l}`, `all heads of layer ${l}`, () => toggle(everywhere().filter((place) => place[0] === l)))));
      for (let h = 0; h < heads; h++) {
        const name = `layer ${l}, head ${h}`;
        const slider = Object.assign(element("input"), { type: "range", min: 0, max: 1, step: 0.05 });
        slider.setAttribute("aria-label", `gate of ${name}`);
        slider.addEventListener("input", () => turn((rows) => { rows[l][h] = slider.valueAsNumber; }));
        const one = button("", name, () => toggle([[l, h]]));
        Object.assign(one.dataset, { layer: l, head: h });
        row.append(element("td", "", one, slider));
      }
      body.append(row);
    }
    $("gates").replaceChildren(element("thead", "", head), body);
  }

  function drawGrid() {
    if (layOutOf !== state.site) buildGrid();
    $("gates").querySelectorAll("tbody tr").forEach((row, l) => row.querySelectorAll("td").forEach((cell, h) => {
      const gate = gates[state.site][l][h];
      const [one, slider] = cell.children;
      const kind = gate === 1 ? "" : gate === 0 ? "off" : "part";
      const text = gate === 1 ? "on" : gate === 0 ? "off" : gate.toFixed(2).replace(/^0/, "");
      if (one.textContent !== text) one.textContent = text;
      if (one.className !== kind) one.className = kind;
      one.style.setProperty("--gate", `${100 * gate}%`);
      one.setAttribute("aria-pressed", gate === 1);
      if (document.activeElement !== slider) slider.value = gate;
    }));
    const others = Object.keys(gates).filter((site) => site !== state.site && gates[site].some((row) => row.some((gate) => gate !== 1)));
    $("elsewhere").hidden = others.length === 0;
    $("elsewhere").textContent = `Heads are off at ${others.join(" and ")}, too.`;
  }

  // Requests. While one is on its way, only what is wanted last is remembered: a slider never queues up.
  async function ask(what, contents, signal) {
    const response = await fetch(what, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(contents), signal });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error ?? response.statusText);
    return found;
  }
  const wish = () => ({ image: state.image, off: state.off, object: state.object < 0 ? null : state.object, ablation: state.ablation });
  const keyOf = (wanted) => JSON.stringify(wanted);
  let shown = null; // the key of what is on the picture
  let busy = false;

  function complain(error) {
    $("error").hidden = !error;
    if (error) $("error").textContent = error instanceof TypeError ? "The server does not answer: has `headoff live` ended?" : error.message;
  }

  // Below the message about a link to something that does not exist.
  async function drawBaseline(wanted) {
    try {
      answer = await ask("boxes", { ...wanted, off: "none", object: null, ablation: "zero" });
      draw(wanted);
    } catch (error) {
      complain(error);
    }
  }

  async function follow() {
    if (busy) return;
    busy = true;
    while (shown !== keyOf(wish())) {
      const wanted = wish();
      const key = keyOf(wanted);
      try {
        const found = await ask("boxes", wanted);
        complain(null);
        answer = found;
        if (state.off === wanted.off && gatesOf !== wanted.off) {
          gates = answer.gates;
          gatesOf = wanted.off;
        }
        draw(wanted);
      } catch (error) {
        complain(error);
        if (!answer) await drawBaseline(wanted);
      }
      shown = key;
      document.dispatchEvent(new CustomEvent("drawn", { detail: key }));
    }
    busy = false;
    followMap();
  }

  // The map comes in a request of its own, when boxes are there. What another change makes stale is dropped.
  const maps = new Map();
  let asking = null; // { key, controller }
  const mapWish = () => ({ ...wish(), map: state.map, head: state.head < 0 ? null : state.head });
  const mapKey = () => JSON.stringify(mapWish());

  async function followMap() {
    const key = mapKey();
    const wanted = state.map >= 0 && answer && state.map < answer.objects.length;
    if (asking && asking.key !== key) {
      asking.controller.abort();
      asking = null;
    }
    if (!wanted || busy || asking) return drawMap();
    if (!maps.has(key)) {
      const mine = { key, controller: new AbortController() };
      asking = mine;
      drawMap();
      try {
        maps.set(key, await ask("maps", mapWish(), mine.controller.signal));
        if (maps.size > 64) maps.delete(maps.keys().next().value);
      } catch (error) {
        if (error.name !== "AbortError") complain(error);
      }
      if (asking === mine) asking = null;
    }
    drawMap();
  }

  function drawMap() {
    const found = maps.get(mapKey());
    const wanted = state.map >= 0 && answer && state.map < answer.objects.length;
    $("under").hidden = !wanted;
    root.classList.toggle("stale", wanted && !found);
    const evidence = $("evidence");
    if (!wanted || (!found && !evidence.src)) evidence.hidden = true;
    $("map-told").hidden = !wanted;
    if (!found || !wanted) return;
    evidence.hidden = false;
    evidence.src = found.maps[state.layer];
    evidence.style.width = `${100 * found.span[0]}%`;
    evidence.style.height = `${100 * found.span[1]}%`;
    const mass = found.masses[state.layer];
    const share = found.shares[state.layer];
    const short = (number) => Number(number.toPrecision(3));
    const { name } = answer.objects[state.map];
    const inside = `${Math.round(100 * share)}% of it in the box with none off`;
    const full = short(found.greatest[state.layer]);
    $("map-told").textContent =
      state.head < 0
        ? `Relevance of ${name} after layer ${state.layer}: ${mass > 0 ? `mass ${short(mass)}, ${inside}` : "no image evidence"}. Full colour: ${full}, its greatest with none off.`
        : `Attention of head ${state.head} of layer ${state.layer} at the query of ${name}: ${mass > 0 ? inside : "the head is off"}. Full colour: a weight of ${full}, its greatest there with none off.`;
    document.dispatchEvent(new CustomEvent("mapped"));
  }

  function options(select, entries) {
    const same = select.options.length === entries.length && entries.every(([value, text], i) => select.options[i].value === String(value) && select.options[i].text === text);
    if (!same) select.replaceChildren(...entries.map(([value, text]) => Object.assign(new Option(text, value))));
  }

  function draw(wanted) {
    root.style.setProperty("--aspect", answer.aspect);
    root.style.setProperty("--width", `${answer.width}px`);
    $("picture").classList.toggle("pixelated", answer.pixelated);
    const url = `url("images/${wanted.image}")`;
    if ($("picture").style.backgroundImage !== url) $("picture").style.backgroundImage = url;
    $("marks").replaceChildren(...answer.marks.map((mark) => {
      const made = element("div", `mark ${mark.line}`);
      const [left, top, width, height] = mark.sides;
      Object.assign(made.style, { left: `${left}%`, top: `${top}%`, width: `${width}%`, height: `${height}%` });
      made.style.setProperty("--c", mark.colour);
      made.style.setProperty("--i", mark.ink);
      if (mark.name) made.append(element("b", "", `${mark.name} `, element("i", "", mark.note)));
      return made;
    }));
    layOutLabels($("picture"));
    $("picture-title").textContent = answer.title;
    $("picture").setAttribute("aria-label", `${answer.title}. ${answer.told.join(" ")}`);
    $("verdict").textContent = answer.told.slice(0, 2).join(" ");
    const counts = [[answer.duplicates, "duplicates"], [answer.unmatched, "unmatched"]].map(([count, name]) => `${count} ${name}`);
    $("told").replaceChildren(element("li", "quiet", `${counts.join(", ")}.`), ...answer.told.map((line) => element("li", "", line)));
    $("found").replaceChildren(...answer.objects.map((found) => {
      const swatch = element("span", "swatch");
      swatch.style.background = found.colour;
      const letter = element("b", "", found.letter);
      letter.style.background = found.fill;
      const level = element("i");
      level.style.width = `${100 * found.now}%`;
      level.style.setProperty("--c", found.colour);
      return element("tr", "", element("td", "", swatch, found.name), element("td", "", letter, found.status), element("td", "number", found.before.toFixed(2)), element("td", "number", found.now.toFixed(2)), element("td", "bar-of", element("div", "", level)), element("td", "number", found.iou ? found.iou.toFixed(2) : "–"));
    }));
    $("command").textContent = answer.command;
    $("program").textContent = answer.program;
    drawChoices();
    drawGrid();
  }

  function drawChoices() {
    options($("image"), about.images.map(({ id, name }) => [id, name]));
    const objects = answer ? answer.objects.map(({ name }, o) => [o, name]) : [];
    options($("object"), [[-1, "all objects"], ...objects.map(([o, name]) => [o, `${name} alone`])]);
    options($("map"), [[-1, "none"], ...objects]);
    options($("head"), [[-1, "relevance"], ...Array.from({ length: about.heads }, (_, h) => [h, `attention of H${h}`])]);
    for (const id of ["image", "site", "object", "ablation", "map", "head", "layer"]) $(id).value = state[id];
    for (const id of ["smooth", "boxes"]) $(id).checked = state[id];
    $("layer-now").textContent = state.layer;
  }

  async function send(file) {
    if (!file) return;
    if (file.size > about.most_bytes) return complain(new Error(`${file.name} has more than ${about.most_bytes / 2 ** 20} MB: make it smaller first`));
    try {
      const response = await fetch(`images?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
      const found = await response.json();
      if (!response.ok) throw new Error(found.error ?? response.statusText);
      about.images.push(found);
      page.set({ image: found.id, object: -1, map: -1 });
    } catch (error) {
      complain(error);
    }
  }

  const whole = (value) => Number.isInteger(value) && value >= -1;
  page.define("image", about.images[0].id, (value) => about.images.some(({ id }) => id === value));
  page.define("off", "none", () => true);
  page.define("site", Object.keys(about.sites).includes("decoder_cross") ? "decoder_cross" : Object.keys(about.sites)[0], (value) => value in about.sites);
  page.define("object", -1, whole);
  page.define("ablation", about.ablations[0], (value) => about.ablations.includes(value));
  page.define("map", -1, whole);
  page.define("head", -1, (value) => whole(value) && value < about.heads);
  page.define("layer", about.layers - 1, (value) => Number.isInteger(value) && value >= 0 && value < about.layers);
  page.define("smooth", false, () => true);
  page.define("boxes", true, () => true);
  page.followers.push(() => {
    root.classList.toggle("smooth", state.smooth);
    root.classList.toggle("bare", !state.boxes);
    drawChoices();
    drawGrid();
    follow();
    followMap();
  });

  $("layer").max = about.layers - 1;
  for (const id of ["image", "site", "object", "ablation", "map", "head", "layer", "smooth", "boxes"])
    $(id).addEventListener("input", ({ target }) => {
      const value = target.type === "checkbox" ? target.checked : typeof state[id] === "number" ? Number(target.value) : target.value;
      page.set(id === "image" ? { image: value, object: -1, map: -1 } : { [id]: value });
    });
  $("all-on").addEventListener("click", () => setAll(1));
  $("all-off").addEventListener("click", () => setAll(0));
  $("file").addEventListener("change", ({ target }) => send(target.files[0]).then(() => { target.value = ""; }));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      root.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") send(event.dataTransfer.files[0]);
    });
  for (const button of document.querySelectorAll(".copy"))
    button.addEventListener("click", async () => {
      const words = button.textContent;
      const text = button.dataset.of === "address" ? location.href : $(button.dataset.of).textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        button.textContent = "not allowed by the browser";
      }
      setTimeout(() => { button.textContent = words; }, 1500);
    });

  const by = (name, step, count) => () => page.set({ [name]: (state[name] + step + count) % count });
  const keys = {
    "+": () => setAll(1),
    "-": () => setAll(0),
    o: () => page.set({ map: answer && state.map + 1 < answer.objects.length ? state.map + 1 : -1 }),
    h: () => page.set({ head: state.head + 1 < about.heads ? state.head + 1 : -1 }),
    ",": by("layer", -1, about.layers),
    ".": by("layer", 1, about.layers),
    s: () => page.set({ smooth: !state.smooth }),
    b: () => page.set({ boxes: !state.boxes }),
  };
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input:not([type=checkbox]), select, pre") || event.ctrlKey || event.metaKey || event.altKey) return;
    const cell = event.target.closest("#gates td button");
    const move = cell && { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (move) {
      event.preventDefault();
      document.querySelector(`#gates [data-layer="${Number(cell.dataset.layer) + move[0]}"][data-head="${Number(cell.dataset.head) + move[1]}"]`)?.focus();
    } else if (/^\d$/.test(event.key) && Number(event.key) < about.sites[state.site][1]) toggleHead(Number(event.key));
    else keys[event.key]?.();
  });
  page.follow();
})();
