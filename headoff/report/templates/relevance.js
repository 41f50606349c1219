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

  const methods = channels.filter(({ method }) => method).length; // they come first, the heads' attention after them
  const several = methods > 1;

  // Full colour: the greatest value of all, and of each object; of a method's relevance, or of any head's attention.
  function topsOf(chosen) {
    const tops = objects.map(() => 0);
    for (const { greatest } of chosen)
      greatest.forEach((value, index) => {
        const object = Math.floor(index / layers.length) % objects.length;
        tops[object] = Math.max(tops[object], value);
      });
    return { objects: tops, all: Math.max(...tops) };
  }
  const tops = [...Array(methods + 1).keys()].map((of) => topsOf(channels.filter(({ group }) => group === of)));

  // From 0 to the greatest of all or of the object; on its own scale from a map's least, or 0. What is constant is 0 there.
  function valuesOf(channel, index, object) {
    const { least, greatest, group } = channels[channel];
    const span = greatest[index] - least[index];
    const low = state.scale === "map" ? Math.max(least[index], 0) : 0;
    const top = { sweep: tops[group].all, object: tops[group].objects[object], map: greatest[index] }[state.scale];
    return (byte) => (span > 0 || state.scale !== "map" ? Math.max((least[index] + (span * byte) / 255 - low) / (top - low || 1), 0) : 0);
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
    const { greatest, least, method } = channels[channel];
    const nothing = least[index] < 0 ? "only evidence against it" : method ? "no image evidence" : "off";
    const no = now.query === null ? "not found" : greatest[index] > 0 ? "" : nothing;
    map.classList.toggle("without", no !== "");
    map.querySelector(".no").textContent = no;
    if (!no) paint(map.querySelector("canvas"), channel, index, object, times);
    place(map.querySelector(".now"), now.box);
    place(map.querySelector(".first"), apart(now.box, objects[object].first) ? objects[object].first : null);
    return no;
  }

  const shownMethod = () => (state.map < methods ? state.map : 0);

  function newTile(colour, words, chosen) {
    const tile = element("button", "tile", newMap(colour), element("span", "", words));
    tile.type = "button";
    tile.addEventListener("click", () => page.set(chosen()));
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
    const strip = element("div", "tiles", ...layers.map((layer, m) => newTile(object.colour, `layer ${layer}`, () => ({ layer: m, map: shownMethod() }))));
    strip.style.setProperty("--tiles", layers.length);
    const choices = (kind, from, to) => element("div", `tiles ${kind}`, ...channels.slice(from, to).map(({ name }, i) => newTile(object.colour, name, () => ({ map: from + i }))));
    const compared = choices("compared", 0, several ? methods : 0);
    const heads = choices("heads", methods);
    compared.style.setProperty("--tiles", Math.min(methods, 4));
    heads.style.setProperty("--tiles", 4);
    const large = newMap(object.colour);
    const caption = element("p", "caption");
    const parts = [title, large, caption, slider, strip];
    if (several) parts.push(element("p", "caption of-methods"), compared);
    if (channels.length > methods) parts.push(element("p", "caption of-heads"), heads);
    const card = element("article", "card", ...parts);
    return { card, title, large, caption, slider, strip, compared, heads };
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
    const layer = layers[state.layer];
    const { name: channel, method, masses, shares, greatest } = channels[state.map];
    const mass = () => `mass ${short(masses[configuration][o][state.layer])}, ${Math.round(100 * shares[configuration][o][state.layer])}% of it in the box`;
    card.caption.textContent = method
      ? `${several ? channel : "relevance"} after layer ${layer}: ${no || mass()}`
      : `attention, ${channel} of layer ${layer}: ${no || `at most ${short(greatest[at(configuration, o, state.layer)])} on a token`}`;
    card.slider.value = state.layer;
    [...card.strip.children].forEach((tile, m) => {
      fill(tile.firstChild, configuration, o, shownMethod(), m, state.smooth ? 2 : 1);
      tile.setAttribute("aria-pressed", state.map < methods && state.layer === m);
    });
    if (several) card.card.querySelector(".of-methods").textContent = `Relevance after layer ${layer}, by method`;
    if (channels.length > methods) card.card.querySelector(".of-heads").textContent = `Attention of query ${query ?? "–"} in layer ${layer}, per head`;
    [...card.compared.children, ...card.heads.children].forEach((tile, i) => {
      const map = several ? i : methods + i;
      fill(tile.firstChild, configuration, o, map, state.layer, state.smooth ? 2 : 1);
      tile.setAttribute("aria-pressed", state.map === map);
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
    const { method, group } = channels[state.map];
    const what = method ? "relevance" : "attention";
    $("ramp-to").textContent = {
      sweep: `${short(tops[group].all)}, the greatest ${what} of any object`,
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
