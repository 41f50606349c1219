"use strict";
// The maps of the configuration that is shown. They come as bytes and are coloured here.
(() => {
  const source = document.getElementById("maps-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const $ = (id) => document.getElementById(id);
  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const { rows, columns, layers, objects } = data;
  const tokens = rows * columns;
  const colours = { plain: bytesOf(data.colours.plain), overlay: bytesOf(data.colours.overlay) };
  const channels = data.channels.map((each) => ({ ...each, bytes: bytesOf(each.bytes) }));
  const root = document.documentElement;
  let overlay = data.overlay;
  let scale = data.scale;
  let channel = channels[0];
  let frame = 0;
  let chosen = null; // [object, layer] of the map that lies over the picture

  const at = (configuration, object, layer) => (configuration * objects.length + object) * layers.length + layer;

  function greatestOf(object) {
    let greatest = 0;
    for (let c = 0; c < data.configurations.length; c++)
      for (let o = 0; o < objects.length; o++)
        if (object === null || o === object)
          for (let m = 0; m < layers.length; m++) greatest = Math.max(greatest, channel.greatest[at(c, o, m)]);
    return greatest;
  }
  let tops = [];
  const measure = () => { tops = [greatestOf(null), ...objects.map((_, o) => greatestOf(o))]; };

  // From 0 to the greatest of all, or of the object; on its own scale from a map's least. What is constant is 0 there.
  function valuesOf(index, object) {
    const least = channel.least[index];
    const span = channel.greatest[index] - least;
    const top = scale === "sweep" ? tops[0] : tops[object + 1];
    return (byte) => {
      if (scale === "map") return span > 0 ? byte / 255 : 0;
      return top > 0 ? (least + (span * byte) / 255) / top : 0;
    };
  }

  function paint(canvas, index, object) {
    const value = valuesOf(index, object);
    const table = overlay ? colours.overlay : colours.plain;
    const picture = new ImageData(columns, rows);
    for (let token = 0; token < tokens; token++) {
      const number = value(channel.bytes[index * tokens + token]);
      const colour = 3 * Math.round(255 * number);
      for (let part = 0; part < 3; part++) picture.data[4 * token + part] = table[colour + part];
      picture.data[4 * token + 3] = overlay ? 255 * data.opacity * Math.sqrt(number) : 255;
    }
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
    [canvas.width, canvas.height] = [columns, rows];
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

  function fill(map, configuration, object, layer) {
    const index = at(configuration, object, layer);
    const now = data.configurations[configuration].objects[object];
    const some = channel.greatest[index] > 0;
    const no = now.query === null ? "not found" : some ? "" : channel === channels[0] ? "no image evidence" : "head off";
    map.classList.toggle("without", no !== "");
    map.querySelector(".no").textContent = no;
    if (!no) paint(map.querySelector("canvas"), index, object);
    place(map.querySelector(".now"), now.box);
    place(map.querySelector(".first"), apart(now.box, objects[object].first) ? objects[object].first : null);
    return no;
  }

  const tiles = objects.map((object, o) => {
    const heading = element("h4");
    const told = element("p", "quiet");
    const row = element("div", "tiles");
    const made = layers.map((layer, m) => {
      const tile = element("button", "tile", newMap(object.colour), element("span"));
      tile.type = "button";
      tile.addEventListener("click", () => {
        chosen = chosen && chosen[0] === o && chosen[1] === m ? null : [o, m];
        show();
      });
      row.append(tile);
      return tile;
    });
    $("map-rows").append(element("div", "map-row", element("div", "", heading, told), row));
    return { heading, told, made };
  });

  function describe(configuration, o) {
    const now = data.configurations[configuration].objects[o];
    const swatch = element("span", "swatch");
    swatch.style.background = objects[o].colour;
    const score = now.score === null ? "not found" : now.score.toFixed(2);
    tiles[o].heading.replaceChildren(swatch, `${now.name} ${score}`);
    const was = objects[o].score.toFixed(2);
    const changed = was === score ? "" : `, was ${was}`;
    tiles[o].told.textContent = now.query === null ? `was ${was}` : `query ${now.query}${changed}`;
    tiles[o].made.forEach((tile, m) => {
      const no = fill(tile.firstChild, configuration, o, m);
      const mass = data.configurations[configuration].masses[o][m];
      const share = data.configurations[configuration].shares[o][m];
      const numbers = no || channel !== channels[0] ? [] : [`mass ${Number(mass.toPrecision(3))}`, `${Math.round(100 * share)}% in box`];
      tile.lastChild.replaceChildren(`layer ${layers[m]}`, ...numbers.map((each) => element("span", "", each)));
      tile.setAttribute("aria-label", `${now.name}, layer ${layers[m]}: ${no || numbers.join(", ")}`);
      tile.setAttribute("aria-pressed", chosen !== null && chosen[0] === o && chosen[1] === m);
    });
  }

  function show() {
    const configuration = data.frames[frame] ?? null;
    $("map-rows").hidden = configuration === null;
    for (const old of document.querySelectorAll(".picture > .map")) old.remove();
    if (configuration === null) return;
    objects.forEach((_, o) => describe(configuration, o));
    const picture = document.querySelector(".frame.current .picture");
    if (chosen && picture) {
      const map = newMap(objects[chosen[0]].colour);
      fill(map, configuration, ...chosen);
      picture.prepend(map);
    }
  }

  function restyle() {
    measure();
    root.classList.toggle("overlaid", overlay);
    const table = overlay ? colours.overlay : colours.plain;
    const ramp = new ImageData(256, 1);
    for (let i = 0; i < 256; i++) ramp.data.set([...table.subarray(3 * i, 3 * i + 3), 255], 4 * i);
    $("ramp").getContext("2d").putImageData(ramp, 0, 0);
    $("ramp-from").textContent = scale === "map" ? "each map's least" : "0";
    $("ramp-to").textContent = { sweep: Number(tops[0].toPrecision(3)), object: "object's greatest", map: "greatest" }[scale];
    show();
  }

  root.classList.add("mapped");
  const shape = getComputedStyle(root).getPropertyValue("--aspect").split("/").map(Number);
  $("maps").style.setProperty("--shape", shape[0] / shape[1]);
  // Maps of a wide image are too flat to be seen six abreast.
  $("maps").style.setProperty("--layers", shape[0] > 1.9 * shape[1] ? Math.min(layers.length, 3) : layers.length);
  $("maps").style.setProperty("--abreast", Math.min(layers.length, 3));
  $("scale").value = scale;
  $("overlay").checked = overlay;
  $("scale").addEventListener("change", (event) => { scale = event.target.value; restyle(); });
  $("overlay").addEventListener("change", (event) => { overlay = event.target.checked; restyle(); });
  $("channel")?.addEventListener("change", (event) => { channel = channels[event.target.value]; restyle(); });
  document.addEventListener("configuration", (event) => { frame = event.detail; show(); });
  restyle();
})();
