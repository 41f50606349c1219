"use strict";
// Without this script the page shows every configuration, one below the other.
(() => {
  const frames = [...document.querySelectorAll(".frame")];
  if (frames.length === 0) return;
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const slider = $("slider");
  const filter = $("filter");
  let open = frames;
  let current = frames[0];

  const rowOf = (frame) => document.querySelector(`tr[data-frame="${frame.id}"]`);

  function show(frame) {
    current.classList.remove("current");
    rowOf(current)?.classList.remove("here");
    current = frame;
    current.classList.add("current");
    rowOf(current)?.classList.add("here");
    const place = open.indexOf(current);
    slider.value = Math.max(place, 0);
    slider.setAttribute("aria-valuetext", current.dataset.title);
    $("position").textContent = `${place + 1} of ${open.length}`;
    $("previous").disabled = place <= 0;
    $("next").disabled = place >= open.length - 1;
    // The maps of an explanation, where there are some, follow.
    document.dispatchEvent(new CustomEvent("configuration", { detail: frames.indexOf(current) }));
    $("spoken").textContent = `${current.dataset.title}. ${current.querySelector(".told").textContent.trim()}`;
  }

  function step(by) {
    const place = open.indexOf(current) + by;
    if (place >= 0 && place < open.length) show(open[place]);
  }

  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (element) => words.every((word) => element.dataset.find.includes(word));
    for (const row of document.querySelectorAll("tr[data-find]")) row.classList.toggle("filtered", !fits(row));
    for (const frame of frames) frame.classList.toggle("filtered", !fits(frame));
    open = frames.filter(fits);
    slider.max = Math.max(open.length - 1, 0);
    $("nomatch").hidden = open.length > 0;
    if (open.length === 0) {
      $("position").textContent = "0 of 0";
      $("previous").disabled = $("next").disabled = true;
    } else {
      show(open.includes(current) ? current : open[0]);
    }
  }

  function follow() {
    const frame = frames.find((each) => `#${each.id}` === location.hash);
    if (!frame) return;
    if (filter && frame.classList.contains("filtered")) { filter.value = ""; narrow(); }
    show(frame);
  }

  root.classList.add("stepping");
  slider.max = frames.length - 1;
  slider.addEventListener("input", () => show(open[slider.valueAsNumber]));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("all").addEventListener("change", (event) => root.classList.toggle("all", event.target.checked));
  $("boxes").addEventListener("change", (event) => root.classList.toggle("bare", !event.target.checked));
  filter?.addEventListener("input", narrow);
  document.addEventListener("keydown", (event) => {
    // Fields, sliders and what scrolls sideways have a use of their own for the arrows.
    if (event.target.closest("input, .scroll, .outcomes") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
  });
  window.addEventListener("hashchange", follow);
  show(frames[0]);
  follow();
})();
