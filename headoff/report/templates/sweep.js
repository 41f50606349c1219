// Without this script the page shows every configuration, one below the other.
(() => {
  const frames = [...document.querySelectorAll(".frame")];
  if (frames.length === 0) return;
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const slider = $("slider"); // null where there are switches
  const filter = $("filter");
  let open = frames;
  let current = frames[0];

  function mark(frame, on) {
    frame.classList.toggle("current", on);
    for (const cell of document.querySelectorAll(`[data-frame="${frame.id}"], [data-column="${frame.id}"]`)) cell.classList.toggle("here", on);
  }

  function showPlace() {
    const place = open.indexOf(current);
    slider.max = Math.max(open.length - 1, 0);
    slider.value = Math.max(place, 0);
    slider.setAttribute("aria-valuetext", current.dataset.title);
    $("position").textContent = `${place + 1} of ${open.length}`;
    $("previous").disabled = place <= 0;
    $("next").disabled = place < 0 || place >= open.length - 1;
  }

  function show(frame) {
    mark(current, false);
    current = frame;
    mark(current, true);
    if (slider) showPlace();
    $("spoken").textContent = `${current.dataset.title}. ${current.querySelector(".told").textContent.trim()}`;
  }

  const choose = (frame) => page.set({ step: frames.indexOf(frame) });

  function step(by) {
    const place = open.indexOf(current) + by;
    if (place >= 0 && place < open.length) choose(open[place]);
  }

  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (element) => words.every((word) => element.dataset.find.includes(word));
    for (const row of document.querySelectorAll("tr[data-find]")) row.classList.toggle("filtered", !fits(row));
    for (const frame of frames) frame.classList.toggle("filtered", !fits(frame));
    open = frames.filter(fits);
    $("nomatch").hidden = open.length > 0;
    if (open.length > 0) choose(open.includes(current) ? current : open[0]);
    else if (slider) showPlace();
  }

  page.define("step", 0, (value) => value in frames);
  page.define("all", false, () => true);
  page.define("boxes", true, () => true);
  page.followers.push((state) => {
    const frame = frames[state.step];
    if (filter && frame.classList.contains("filtered")) {
      filter.value = "";
      narrow();
    }
    show(frame);
    $("all").checked = state.all;
    $("boxes").checked = state.boxes;
    root.classList.toggle("all", state.all);
    root.classList.toggle("bare", !state.boxes);
  });

  // Beside a picture there is room for its detections.
  if (matchMedia("(min-width: 64rem)").matches) for (const details of document.querySelectorAll(".frame details")) details.open = true;
  root.classList.add("stepping");
  slider?.addEventListener("input", () => choose(open[slider.valueAsNumber]));
  $("previous")?.addEventListener("click", () => step(-1));
  $("next")?.addEventListener("click", () => step(1));
  $("all").addEventListener("change", (event) => page.set({ all: event.target.checked }));
  $("boxes").addEventListener("change", (event) => page.set({ boxes: event.target.checked }));
  filter?.addEventListener("input", narrow);
  page.keys = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    a: () => page.set({ all: !page.state.all }),
    b: () => page.set({ boxes: !page.state.boxes }),
  };
  document.addEventListener("keydown", (event) => {
    // Fields, sliders and what scrolls sideways have a use of their own for keys.
    if (event.target.closest("input:not([type=checkbox]), select, .scroll") || event.ctrlKey || event.metaKey || event.altKey) return;
    page.keys[event.key]?.();
  });
})();
