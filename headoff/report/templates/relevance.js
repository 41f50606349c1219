// Maps of the configuration that is shown. They come as bytes and are coloured here.
(() => {
  const source = document.getElementById("maps-data");
  if (!source) return;
  const MOST_CARDS = 12; // objects with a card, until more are asked for
  const data = JSON.parse(source.textContent);
  const $ = (id) => document.getElementById(id);
  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const { rows, columns, layers, objects } = data;
  const tokens = rows * columns;
  const colours = { plain: bytesOf(data.colours.plain), overlay: bytesOf(data.colours.overlay) };
  const channels = data.channels.map((channel) => ({ ...channel, bytes: bytesOf(channel.bytes) }));
  const root = document.documentElement;
  const { state } = page;

  const at = (configuration, object, layer) => (configuration * objects.length + object) * layers.length + layer;
  const isFound = (configuration, object) => data.configurations[configuration].objects[object].query !== null;

  // Full colour: the greatest value of all, and of each object; of relevance, or of the attention of any head.
  function topsOf(chosen) {
    const tops = objects.map(() => 0);
    for (const { greatest } of chosen)
      greatest.forEach((value, index) => {
        const object = Math.floor(index / layers.length) % objects.length;
        tops[object] = Math.max(tops[object], value);
      });
    return { objects: tops, all: Math.max(...tops) };
  }
  const tops = [topsOf(channels.slice(0, 1)), topsOf(channels.slice(1))];

  // From 0 to the greatest of all or of the object; on its own scale from a map's least. What is constant is 0 there.
  function valuesOf(channel, index, object) {
    const { least, greatest } = channels[channel];
    const span = greatest[index] - least[index];
    const top = tops[channel ? 1 : 0];
    const full = state.scale === "sweep" ? top.all : top.objects[object];
    if (state.scale === "map") return (byte) => (span > 0 ? byte / 255 : 0);
    return (byte) => (full > 0 ? (least[index] + (span * byte) / 255) / full : 0);
  }

  // The bytes of a map, between tokens those between their bytes.
  function cellsOf(channel, index, times) {
    const bytes = channels[channel].bytes.subarray(index * tokens, (index + 1) * tokens);
    if (times === 1) return bytes;
    const cells = new Float32Array(tokens * times * times);
    const ends = (place, count) => {
      const middle = Math.min(Math.max((place + 0.5) / times - 0.5, 0), count - 1);
      const low = Math.floor(middle);
      return [low, Math.min(low + 1, count - 1), middle - low];
    };
    for (let row = 0, cell = 0; row < rows * times; row++) {
      const [above, below, down] = ends(row, rows);
      for (let column = 0; column < columns * times; column++, cell++) {
        const [left, right, over] = ends(column, columns);
        const upper = bytes[above * columns + left] * (1 - over) + bytes[above * columns + right] * over;
        const lower = bytes[below * columns + left] * (1 - over) + bytes[below * columns + right] * over;
        cells[cell] = upper * (1 - down) + lower * down;
      }
    }
    return cells;
  }

  function paint(canvas, channel, index, object, times) {
    const value = valuesOf(channel, index, object);
    const table = state.overlay ? colours.overlay : colours.plain;
    const cells = cellsOf(channel, index, times);
    const picture = new ImageData(columns * times, rows * times);
    for (let cell = 0; cell < cells.length; cell++) {
      const colour = 4 * Math.round(255 * Math.min(value(cells[cell]), 1));
      for (let part = 0; part < 4; part++) picture.data[4 * cell + part] = table[colour + part];
    }
    [canvas.width, canvas.height] = [picture.width, picture.height];
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  function element(kind, name, ...inside) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    made.append(...inside);
    return made;
  }

  function newMap(colour) {
    const canvas = element("canvas");
    canvas.style.width = `${100 * data.span[0]}%`;
    canvas.style.height = `${100 * data.span[1]}%`;
    const map = element("span", "map", element("i", "under"), canvas, element("i", "box first"), element("i", "box now"), element("b", "no"));
    map.style.setProperty("--colour", colour);
    return map;
  }

  function place(box, sides) {
    box.hidden = !sides;
    if (!sides) return;
    const [left, top, right, bottom] = sides.map((side) => 100 * Math.min(Math.max(side, 0), 1));
    Object.assign(box.style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
  }

  const apart = (a, b) => !a || a.some((side, i) => Math.abs(side - b[i]) > 0.015);

  // Draws a map; returns why there is none, or "".
  function fill(map, configuration, object, channel, layer, times) {
    const index = at(configuration, object, layer);
    const now = data.configurations[configuration].objects[object];
    const some = channels[channel].greatest[index] > 0;
    const no = now.query === null ? "not found" : some ? "" : channel ? "off" : "no image evidence";
    map.classList.toggle("without", no !== "");
    map.querySelector(".no").textContent = no;
    if (!no) paint(map.querySelector("canvas"), channel, index, object, times);
    place(map.querySelector(".now"), now.box);
    place(map.querySelector(".first"), apart(now.box, objects[object].first) ? objects[object].first : null);
    return no;
  }

  function newTile(colour, words, chosen) {
    const tile = element("button", "tile", newMap(colour), element("span", "", words));
    tile.type = "button";
    tile.addEventListener("click", () => page.set(chosen));
    return tile;
  }

  function newCard(object, o) {
    const title = element("button", "title", element("span", "swatch"), element("b"), element("span", "quiet"));
    title.type = "button";
    title.title = "show this map on the picture above";
    title.querySelector(".swatch").style.background = object.colour;
    title.addEventListener("click", () => page.set({ object: state.object === o ? -1 : o }));
    const slider = element("input", "");
    Object.assign(slider, { type: "range", min: 0, max: layers.length - 1, step: 1 });
    slider.addEventListener("input", () => page.set({ layer: slider.valueAsNumber }));
    slider.setAttribute("aria-label", "decoder layer");
    const strip = element("div", "tiles", ...layers.map((layer, m) => newTile(object.colour, `layer ${layer}`, { layer: m, map: 0 })));
    strip.style.setProperty("--tiles", layers.length);
    const heads = element("div", "tiles heads", ...channels.slice(1).map((channel, h) => newTile(object.colour, channel.name, { map: h + 1 })));
    heads.style.setProperty("--tiles", 4);
    const large = newMap(object.colour);
    const caption = element("p", "caption");
    const parts = [title, large, caption, slider, strip];
    if (channels.length > 1) parts.push(element("p", "caption of-heads"), heads);
    const card = element("article", "card", ...parts);
    return { card, title, large, caption, slider, strip, heads };
  }

  const short = (number) => Number(number.toPrecision(3));

  function draw(card, o) {
    const configuration = data.frames[state.step];
    const { query, name, score } = data.configurations[configuration].objects[o];
    const was = objects[o].score.toFixed(2);
    const now = score === null ? "not found" : score.toFixed(2);
    card.title.querySelector("b").textContent = `${name} ${now}`;
    card.title.querySelector(".quiet").textContent = query === null ? `was ${was}` : `query ${query}${was === now ? "" : `, was ${was}`}`;
    card.card.classList.toggle("chosen", state.object === o);
    const no = fill(card.large, configuration, o, state.map, state.layer, state.smooth ? data.smoothing : 1);
    const mass = short(data.configurations[configuration].masses[o][state.layer]);
    const share = Math.round(100 * data.configurations[configuration].shares[o][state.layer]);
    const layer = layers[state.layer];
    card.caption.textContent = state.map
      ? `attention, ${channels[state.map].name} of layer ${layer}: ${no || `at most ${short(channels[state.map].greatest[at(configuration, o, state.layer)])} on a token`}`
      : `relevance after layer ${layer}: ${no || `mass ${mass}, ${share}% of it in the box`}`;
    card.slider.value = state.layer;
    [...card.strip.children].forEach((tile, m) => {
      fill(tile.firstChild, configuration, o, 0, m, state.smooth ? 2 : 1);
      tile.setAttribute("aria-pressed", state.map === 0 && state.layer === m);
    });
    if (channels.length > 1) card.card.querySelector(".of-heads").textContent = `Attention of query ${query ?? "–"} in layer ${layer}, per head`;
    [...card.heads.children].forEach((tile, h) => {
      fill(tile.firstChild, configuration, o, h + 1, state.layer, state.smooth ? 2 : 1);
      tile.setAttribute("aria-pressed", state.map === h + 1);
    });
  }

  const cards = [];

  function addCards(count) {
    for (let o = cards.length; o < Math.min(count, objects.length); o++) {
      cards.push(newCard(objects[o], o));
      $("cards").append(cards[o].card);
    }
    $("more").hidden = cards.length >= objects.length;
    $("more").textContent = `Show the maps of all ${objects.length} objects`;
  }

  // The chosen object's map on the pictures: of the current configuration, or of all.
  function drawOnPictures() {
    for (const old of document.querySelectorAll(".picture > .map")) old.remove();
    if (state.object < 0) return;
    document.querySelectorAll(".frame").forEach((frame, step) => {
      const configuration = data.frames[step] ?? null;
      if (configuration === null || !(state.all || step === state.step) || frame.classList.contains("filtered")) return;
      const map = newMap(objects[state.object].colour);
      fill(map, configuration, state.object, state.map, state.layer, state.smooth ? data.smoothing : 1);
      frame.querySelector(".picture").prepend(map);
    });
  }

  function drawRamp() {
    const table = state.overlay ? colours.overlay : colours.plain;
    const ramp = new ImageData(256, 1);
    ramp.data.set(table);
    $("ramp").getContext("2d").putImageData(ramp, 0, 0);
    $("ramp-from").textContent = state.scale === "map" ? "each map's least" : "0";
    const what = state.map ? "attention" : "relevance";
    $("ramp-to").textContent = {
      sweep: `${short(tops[state.map ? 1 : 0].all)}, the greatest ${what} of any object`,
      object: `each object's greatest ${what} over configurations and layers`,
      map: `its greatest ${what}`,
    }[state.scale];
  }

  page.define("object", -1, (value) => value === -1 || value in objects);
  page.define("layer", layers.length - 1, (value) => value in layers);
  page.define("map", 0, (value) => value in channels);
  page.define("scale", data.scale, (value) => ["object", "sweep", "map"].includes(value));
  page.define("smooth", data.smooth, () => true);
  page.define("overlay", data.overlay, () => true);
  page.followers.push(() => {
    $("object").value = state.object;
    $("layer").value = state.layer;
    $("layer-now").textContent = layers[state.layer];
    if ($("map")) $("map").value = state.map;
    $("scale").value = state.scale;
    $("smooth").checked = state.smooth;
    $("overlay").checked = state.overlay;
    root.classList.toggle("overlaid", state.overlay);
    root.classList.toggle("smooth", state.smooth);
    drawRamp();
    const drawn = data.frames[state.step] != null;
    $("cards").hidden = !drawn;
    if (drawn) cards.forEach(draw);
    drawOnPictures();
  });
  for (const [id, read] of Object.entries({ object: "value", layer: "value", map: "value", scale: "value", smooth: "checked", overlay: "checked" }))
    $(id)?.addEventListener("input", ({ target }) => page.set({ [id]: typeof state[id] === "number" ? Number(target[read]) : target[read] }));
  $("more").addEventListener("click", () => {
    addCards(objects.length);
    page.set({});
  });
  const by = (name, step, count) => () => page.set({ [name]: (state[name] + step + count) % count });
  Object.assign(page.keys, {
    o: () => page.set({ object: state.object + 1 < objects.length ? state.object + 1 : -1 }),
    ",": by("layer", -1, layers.length),
    ".": by("layer", 1, layers.length),
    s: () => page.set({ smooth: !state.smooth }),
  });
  root.classList.add("mapped");
  const shape = getComputedStyle(root).getPropertyValue("--aspect").split("/").map(Number);
  root.style.setProperty("--shape", shape[0] / shape[1]);
  root.style.setProperty("--card-width", { 1: "40rem", 2: "36rem", 4: "30rem" }[objects.length] ?? "25rem");
  addCards(MOST_CARDS);
})();
