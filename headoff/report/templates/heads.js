"use strict";
// The matrix, the card of the chosen head, columns and interactions, from the data above.
(() => {
  const data = JSON.parse(document.getElementById("heads-data").textContent);
  const $ = (id) => document.getElementById(id);
  if (!$("matrix")) return;
  const { layers, heads } = data;
  const names = { measure: Object.keys(data.measures), value: Object.keys(data.values), ablation: Object.keys(data.ablations) };
  // What is chosen, with the head as numbers: layer is null for a head in all layers.
  const state = {};
  const written = (layer, head) => layer === null ? `H${head}` : `L${layer}H${head}`;
  const read = (text) => {
    const [, layer, head] = /^(?:L(\d+))?H(\d+)$/.exec(text) ?? [];
    return head === undefined || Number(head) >= heads || Number(layer ?? 0) >= layers ? null : [layer === undefined ? null : Number(layer), Number(head)];
  };

  function element(kind, name, ...inside) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    made.append(...inside);
    return made;
  }
  const keyed = new Map(data.scores.map((each) => [`${each.ablation}/${each.measure}/${each.value}`, each]));
  const scoresOf = (measure, value) => keyed.get(`${state.ablation}/${measure}/${value}`);
  const rowOf = (scores) => scores.image || scores.rows.length === 1 ? 0 : state.object === "mean" ? scores.rows.length - 1 : Number(state.object);
  const isColumns = (scores) => layers > 1 && scores.rows.length > 0 && scores.rows[0].length === 1;

  // One scale for all objects.
  function limitOf(rows) {
    const greatest = Math.max(0, ...rows.flat(Infinity).map(Math.abs));
    return greatest > 1e-12 ? greatest : 1;
  }
  const decimalsOf = (limit) => Math.min(Math.max(1 - Math.floor(Math.log10(limit)), 1), 3);
  function text(value, decimals) {
    if (value === null || Number.isNaN(value)) return "–";
    if (Math.abs(value) < 0.5 * 10 ** -decimals) return "0";
    return (value > 0 ? "+" : "−") + Math.abs(value).toFixed(decimals);
  }
  function shade(cell, value, limit) {
    const index = Math.round(50 * Math.max(-1, Math.min(1, value / limit))) + 50;
    cell.style.backgroundColor = data.shades[index];
    cell.style.color = data.inks[index];
  }
  function scale(id, limit) {
    const decimals = decimalsOf(limit);
    const [least, greatest, shades] = id ? ["pairs-least", "pairs-greatest", "pairs-shades"] : ["least", "greatest", "shades"];
    $(least).textContent = text(-limit, decimals);
    $(greatest).textContent = text(limit, decimals);
    $(shades).style.background = `linear-gradient(to right, ${data.shades.filter((_, i) => i % 10 === 0).join(", ")})`;
  }
  const headRow = (label) => {
    const row = element("tr", "", element("th", "", label));
    for (let head = 0; head < heads; head++) row.append(element("th", "", `H${head}`));
    return element("thead", "", row);
  };
  const nameOf = (layer, head) => layer === null ? `Head ${head} in all layers` : `Layer ${layer}, head ${head}`;
  const objectName = () => state.object === "mean" ? data.mean : data.objects[Number(state.object)].name;

  function whatIsScored(scores) {
    return scores.image && data.objects.length ? "the image" : objectName();
  }

  function showMatrix() {
    const scores = scoresOf(state.measure, state.value);
    const told = [`${state.measure}: ${data.measures[state.measure]}`, data.values[state.value], data.ablations[state.ablation]];
    $("meaning").textContent = `${told.join("; ")}.`;
    const table = $("matrix");
    table.replaceChildren();
    if (!scores || !scores.rows.length) {
      table.append(element("tbody", "", element("tr", "", element("td", "", "This measure does not score this value."))));
      return;
    }
    const row = rowOf(scores);
    const values = scores.rows[row];
    const single = values.length === 1 && layers > 1;
    if (single) state.layer = null;
    else if (state.layer === null || state.layer >= values.length) {
      state.layer = values.reduce((best, one, layer) => Math.abs(one[state.head]) > Math.abs(values[best][state.head]) ? layer : best, 0);
    }
    const limit = limitOf(scores.rows);
    const decimals = decimalsOf(limit);
    const body = element("tbody");
    values.forEach((one, layer) => {
      const line = element("tr", "", Object.assign(element("th", "", single ? "all" : `L${layer}`), { scope: "row" }));
      one.forEach((value, head) => {
        const chosen = head === state.head && (single || layer === state.layer);
        const unclear = scores.unclear !== null && scores.unclear[row][layer][head] === 1;
        const button = element("button", unclear ? "unclear" : "", text(value, decimals));
        button.type = "button";
        button.tabIndex = chosen ? 0 : -1;
        shade(button, value, limit);
        let spoken = `${nameOf(single ? null : layer, head)}: ${text(value, decimals)}`;
        if (scores.low && scores.low[row][layer][head] !== null) spoken += `, 95% interval ${text(scores.low[row][layer][head], decimals)} to ${text(scores.high[row][layer][head], decimals)}`;
        if (unclear) spoken += ", the interval spans 0";
        button.setAttribute("aria-label", spoken);
        button.title = spoken;
        button.addEventListener("click", () => choose(single ? null : layer, head, true));
        const cell = element("td", "", button);
        cell.setAttribute("role", "gridcell");
        cell.setAttribute("aria-selected", chosen);
        line.append(cell);
      });
      body.append(line);
    });
    table.append(headRow(""), body);
    if ($("hatched")) $("hatched").hidden = scores.unclear === null || scores.low !== undefined;
    scale("", limit);
  }

  function choose(layer, head, focus) {
    page.set({ head: written(layer, head) });
    if (focus) document.querySelector('#matrix [aria-selected="true"] button')?.focus();
  }

  // The card.
  const colourOf = (object) => object === null ? "#ffffff" : data.objects[object].colour;
  function markOf(box, colour, kind, name, note) {
    const mark = element("div", `mark ${kind}`);
    const [left, top, width, height] = box;
    Object.assign(mark.style, { left: `${left}%`, top: `${top}%`, width: `${width}%`, height: `${height}%` });
    mark.style.setProperty("--c", colour);
    mark.style.setProperty("--i", data.over[colour] ?? "#000000");
    if (name) mark.append(element("b", "", `${name} `, element("i", "", note)));
    return mark;
  }
  function showPicture() {
    if (!data.cards) return;
    const card = data.cards[state.ablation];
    const without = card.without[(state.layer === null ? layers : state.layer) * heads + state.head];
    const marks = [];
    if (state.none) {
      for (const found of card.baseline) marks.push(markOf(found.box, colourOf(found.object), "", `#${found.object} ${found.name}`, found.score));
    } else {
      for (const found of without.boxes) {
        const name = `${found.object === null ? "" : `#${found.object} `}${found.name}`;
        marks.push(markOf(found.box, colourOf(found.object), found.status === "duplicate" ? "duplicate" : "", name, found.score));
      }
      card.baseline.forEach((found, o) => {
        if (without.statuses[o] === "lost") marks.push(markOf(found.box, colourOf(o), "was", `#${o} ${found.name}`, "lost"));
        else if (without.statuses[o] === "moved") marks.push(markOf(found.box, colourOf(o), "was", "", ""));
      });
    }
    // The best detection last, on top.
    $("picture").replaceChildren(...marks.reverse());
    layOutLabels($("picture"));
    const lines = [`Switched off (${state.ablation} ablation):`, ...without.told];
    without.probabilities.forEach((after, o) => {
      const before = Number(card.baseline[o].score);
      if (Math.abs(after - before) >= 0.015) lines.push(`${data.objects[o].name}: probability at its query ${before.toFixed(2)} → ${after.toFixed(2)}`);
    });
    $("told").replaceChildren(...lines.map((line) => element("li", "", line)));
  }

  function showNumbers() {
    const head = element("tr", "", element("th", "", "measure"));
    for (const value of names.value) head.append(element("th", "number", value));
    const body = element("tbody");
    for (const measure of names.measure) {
      const line = element("tr", "", element("td", "", measure));
      let some = false;
      for (const value of names.value) {
        const scores = scoresOf(measure, value);
        let shown = "–";
        if (scores && scores.rows.length) {
          const rows = scores.rows[rowOf(scores)];
          const layer = isColumns(scores) ? 0 : state.layer;
          if (layer !== null) {
            const decimals = decimalsOf(limitOf(scores.rows));
            shown = text(rows[layer][state.head], decimals);
            if (scores.low && scores.low[0][layer][state.head] !== null) shown += ` (${text(scores.low[0][layer][state.head], decimals)} to ${text(scores.high[0][layer][state.head], decimals)})`;
            some = true;
          }
        }
        line.append(element("td", "number", shown));
      }
      if (isColumnsMeasure(measure) && state.layer !== null) line.firstChild.append(element("span", "quiet", " (all layers)"));
      if (some) body.append(line);
    }
    $("numbers").replaceChildren(element("thead", "", head), body);
    $("numbers-of").textContent = `${data.objects.length ? objectName() : data.mean}, ${state.ablation} ablation${data.scores.some((each) => each.low) ? "; in brackets the 95% interval" : ""}.`;
  }
  function isColumnsMeasure(measure) {
    return data.scores.some((each) => each.measure === measure && isColumns(each));
  }

  // Attention maps come as bytes between the least and the greatest of each map.
  const bytes = data.attention && Uint8Array.from(atob(data.attention.bytes), (character) => character.charCodeAt(0));
  function attentionOf(object, layer) {
    const { rows, columns, least, greatest } = data.attention;
    const tokens = rows * columns;
    const values = new Float64Array(tokens);
    const chosen = layer === null ? [...Array(layers).keys()] : [layer];
    for (const each of chosen) {
      const map = (object * layers + each) * heads + state.head;
      for (let t = 0; t < tokens; t++) values[t] += (least[map] + ((greatest[map] - least[map]) * bytes[map * tokens + t]) / 255) / chosen.length;
    }
    return values;
  }
  function showLooks() {
    if (!data.attention) return;
    const { rows, columns, span, objects } = data.attention;
    const chosen = state.object === "mean" ? [...Array(objects).keys()] : [Number(state.object)].filter((o) => o < objects);
    $("looks").replaceChildren(...chosen.map((o) => {
      const values = attentionOf(o, state.layer);
      const greatest = Math.max(...values);
      const canvas = Object.assign(element("canvas"), { width: columns, height: rows });
      canvas.style.width = `${100 * span[0]}%`;
      canvas.style.height = `${100 * span[1]}%`;
      const picture = new ImageData(columns, rows);
      values.forEach((value, t) => picture.data.set([255, 214, 51, 235 * Math.sqrt(greatest > 0 ? value / greatest : 0)], 4 * t));
      canvas.getContext("2d").putImageData(picture, 0, 0);
      const box = data.cards[state.ablation].baseline[o];
      const under = element("div", "under", element("div", "grey"), canvas, markOf(box.box, colourOf(o), "", "", ""));
      const sum = values.reduce((a, b) => a + b, 0);
      const tokens = sum > 0 ? Math.exp(-values.reduce((a, v) => a + (v > 0 ? (v / sum) * Math.log(v / sum) : 0), 0)) : 0;
      return element("figure", "", under, element("figcaption", "", `${data.objects[o].name}: ${tokens < 10 ? tokens.toFixed(1) : Math.round(tokens)} of ${values.length} tokens`));
    }));
    const where = state.layer === null ? "mean over layers of the attention" : "attention";
    $("looks-of").textContent = `Cross-attention of the head, with none off, by the query of each object: ${where}, each map from 0 to its greatest. The number of tokens is the exponential of the entropy: over how many tokens attention is spread.`;
  }

  // Columns and their interactions.
  function showColumns() {
    const ofColumns = names.measure.filter(isColumnsMeasure);
    const measure = ofColumns.find((name) => data.scores.some((each) => each.measure === name && each.pairs !== null)) ?? ofColumns[0];
    const scores = measure && scoresOf(measure, state.value);
    $("columns-section").hidden = !scores || !scores.rows.length;
    if ($("columns-section").hidden) return;
    const row = rowOf(scores);
    const values = scores.rows[row][0];
    const all = scores.rows.flat(2).concat(scores.low ? [...scores.low.flat(2), ...scores.high.flat(2)] : []).filter((value) => value !== null);
    const decimals = decimalsOf(limitOf(scores.rows));
    const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
    const place = (value) => (100 * (value - low)) / (high - low || 1);
    const sum = values.reduce((a, b) => a + b, 0);
    $("columns-meaning").textContent = `${data.measures[measure]}, for ${whatIsScored(scores)}, by ${data.values[state.value]}.${scores.pairs === null ? "" : ` The bars sum to ${text(sum, decimals)}: what all heads together add.`}${data.objects.length > 1 && !scores.image ? " Lines: the objects, in their colours." : ""}`;
    const limit = limitOf(scores.rows);
    $("bars").replaceChildren(element("tbody", "", ...values.map((value, head) => {
      const bar = element("i");
      const from = Math.min(place(0), place(value));
      Object.assign(bar.style, { left: `${from}%`, width: `${Math.abs(place(value) - place(0))}%` });
      bar.style.background = data.shades[value < 0 ? 8 : 92];
      const axis = element("div", "axis", bar);
      axis.style.setProperty("--zero", `${place(0)}%`);
      if (scores.low && scores.low[0][0][head] !== null) {
        const interval = element("u");
        Object.assign(interval.style, { left: `${place(scores.low[0][0][head])}%`, width: `${place(scores.high[0][0][head]) - place(scores.low[0][0][head])}%` });
        axis.append(interval);
      }
      if (!scores.image) {
        data.objects.forEach((object, o) => {
          const tick = element("b");
          tick.style.left = `${place(scores.rows[o][0][head])}%`;
          tick.style.setProperty("--c", object.colour);
          tick.title = `${object.name} ${text(scores.rows[o][0][head], decimals)}`;
          axis.append(tick);
        });
      }
      const button = element("button", "", `H${head}`);
      button.type = "button";
      button.addEventListener("click", () => page.set({ measure, head: written(null, head) }));
      return element("tr", head === state.head ? "here" : "", element("th", "", button), element("td", "", axis), element("td", "number", text(value, decimals)));
    })));
    $("pairs-part").hidden = scores.pairs === null;
    if (scores.pairs === null) return;
    const pairs = scores.pairs[row][0];
    const most = limitOf(scores.pairs);
    const digits = decimalsOf(most);
    $("pairs").replaceChildren(headRow(""), element("tbody", "", ...pairs.map((one, i) => {
      const line = element("tr", "", Object.assign(element("th", "", `H${i}`), { scope: "row" }));
      one.forEach((value, j) => {
        const cell = element("td", i === j ? "self" : "", i === j ? "" : text(value, digits));
        if (i !== j) shade(cell, value, most);
        cell.title = i === j ? "" : `heads ${i} and ${j}: ${text(value, digits)}`;
        line.append(cell);
      });
      return line;
    })));
    scale("pairs", most);
  }

  function showCorrelations() {
    if (!$("correlations")) return;
    const found = data.correlations[`${state.ablation}/${state.value}`];
    $("correlations-section").hidden = !found || found.measures.length < 2;
    if ($("correlations-section").hidden) return;
    const head = element("tr", "", element("th"), ...found.measures.map((name) => element("th", "", ...name.split("_").flatMap((part, i) => i ? ["_", element("wbr"), part] : [part]))));
    $("correlations").replaceChildren(element("thead", "", head), element("tbody", "", ...found.rows.map((one, i) => {
      const line = element("tr", "", Object.assign(element("th", "", found.measures[i]), { scope: "row" }));
      for (const value of one) {
        const cell = element("td", "", value === null ? "–" : text(value, 2));
        if (value !== null) shade(cell, value, 1);
        line.append(cell);
      }
      return line;
    })));
  }

  // A point for each head: its score under the first ablation kind, and under another.
  function showKinds() {
    if (!$("kinds")) return;
    const kinds = [names.ablation[0], state.ablation === names.ablation[0] ? names.ablation[1] : state.ablation];
    const found = kinds.map((kind) => keyed.get(`${kind}/${state.measure}/${state.value}`));
    $("kinds-section").hidden = found.some((scores) => !scores || !scores.rows.length);
    if ($("kinds-section").hidden) return;
    const [x, y] = found.map((scores) => scores.rows[rowOf(scores)]);
    const all = [...x.flat(), ...y.flat(), 0];
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const room = 0.08 * (high - low) || 1;
    const side = 400;
    const place = (value) => (side * (value - low + room)) / (high - low + 2 * room);
    const shape = (kind, attributes, content = "") => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      made.append(content);
      return made;
    };
    const line = (x1, y1, x2, y2, name) => shape("line", { x1, y1: side - y1, x2, y2: side - y2, class: name });
    const zero = place(0);
    const chart = shape("svg", { viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": `scores under ${kinds[0]} and under ${kinds[1]} ablation` });
    chart.append(line(0, 0, side, side, "equal"), line(zero, 0, zero, side, "axes"), line(0, zero, side, zero, "axes"));
    chart.append(shape("text", { x: side - 4, y: Math.min(side - zero + 14, side - 4), "text-anchor": "end" }, `${kinds[0]} →`));
    chart.append(shape("text", { x: Math.max(zero - 6, 40), y: 12, "text-anchor": zero > 60 ? "end" : "start" }, `${kinds[1]} ↑`));
    const single = x.length === 1 && layers > 1;
    const points = x.flatMap((row, layer) => row.map((_, head) => ({ layer, head, x: x[layer][head], y: y[layer][head] })));
    const size = (point) => Math.hypot(point.x, point.y);
    const largest = [...points].sort((a, b) => size(b) - size(a)).slice(0, 16).filter((point) => size(point) >= 0.05 * (high - low));
    const decimals = decimalsOf(Math.max(...found.map((scores) => limitOf(scores.rows))));
    for (const point of points) {
      const layer = single ? null : point.layer;
      const here = point.head === state.head && layer === state.layer;
      const group = shape("g", { class: `${largest.includes(point) ? "" : "unnamed"}${here ? " here" : ""}` });
      const at = { cx: place(point.x), cy: side - place(point.y), r: 5 };
      const end = at.cx > side - 60;
      group.append(shape("circle", at), shape("text", { x: at.cx + (end ? -8 : 8), y: at.cy - 4, "text-anchor": end ? "end" : "start" }, written(layer, point.head)));
      group.append(shape("title", {}, `${nameOf(layer, point.head)}: ${text(point.x, decimals)} under ${kinds[0]}, ${text(point.y, decimals)} under ${kinds[1]}`));
      group.addEventListener("click", () => choose(layer, point.head, false));
      chart.append(group);
    }
    $("kinds").replaceChildren(chart);
    $("kinds-of").textContent = `${state.measure} of ${state.value}, ${whatIsScored(found[0])}: each head under ${kinds[0]} (across) and under ${kinds[1]} ablation (up). On the dashed line both agree.`;
  }

  function show() {
    showMatrix();
    $("card-title").textContent = nameOf(state.layer, state.head);
    showPicture();
    showNumbers();
    showLooks();
    showColumns();
    showCorrelations();
    showKinds();
    for (const what of ["object", "measure", "value", "ablation"]) if ($(what)) $(what).value = state[what];
    if ($("none")) $("none").checked = state.none;
  }

  page.define("object", "mean", (value) => value === "mean" || value in data.objects);
  for (const what in names) page.define(what, names[what][0], (value) => names[what].includes(value));
  page.define("head", written(data.start.layer, data.start.head), (value) => read(value) !== null);
  page.define("none", false, () => true);
  page.followers.push((chosen) => {
    Object.assign(state, chosen);
    [state.layer, state.head] = read(chosen.head);
    show();
  });
  for (const what of ["object", ...Object.keys(names)]) {
    $(what)?.addEventListener("change", (event) => page.set({ [what]: event.target.value }));
  }
  $("none")?.addEventListener("change", (event) => page.set({ none: event.target.checked }));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("select, input, .scroll:not(:has(#matrix))") || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!by) return;
    const inMatrix = event.target.closest("#matrix") !== null;
    // Elsewhere on the page the vertical arrows scroll.
    if (by[0] && !inMatrix) return;
    event.preventDefault();
    const layer = state.layer === null ? null : Math.min(Math.max(state.layer + by[0], 0), layers - 1);
    choose(layer, Math.min(Math.max(state.head + by[1], 0), heads - 1), inMatrix);
  });
  page.follow();
})();
