// Labels of boxes: at their boxes, within the picture, apart from each other. Those without room are shown on pointing.
const layOutLabels = (() => {
  const MOST_COVERED = 0.08; // of a picture, by labels
  const FEW = 10; // labels that are there in any case, unless they would overlap

  function spots(box, width, height, picture) {
    const { left, top } = box;
    const right = left + box.width - width;
    const below = top + box.height;
    return [
      [left, top - height], [left, below], [left, top], [right, top - height], [right, below],
      [right, top], [left, below - height], [left + box.width, top], [left - width, top],
    ].map(([x, y]) => [
      Math.min(Math.max(x, 0), Math.max(picture.width - width, 0)),
      Math.min(Math.max(y, 0), Math.max(picture.height - height, 0)),
    ]);
  }

  const overlap = (x, y, width, height, other) =>
    Math.max(0, Math.min(x + width, other.x + other.width) - Math.max(x, other.x)) *
    Math.max(0, Math.min(y + height, other.y + other.height) - Math.max(y, other.y));

  function layOut(picture) {
    const room = { width: picture.clientWidth, height: picture.clientHeight };
    if (!room.width) return;
    const labels = [...picture.querySelectorAll(".mark > b")].reverse(); // the best detection first
    for (const label of labels) label.className = "";
    const sizes = labels.map((label) => [label.offsetWidth, label.offsetHeight]);
    const boxes = labels.map(({ parentNode: { offsetLeft, offsetTop, offsetWidth, offsetHeight } }) => (
      { left: offsetLeft, top: offsetTop, width: offsetWidth, height: offsetHeight }));
    const placed = [];
    let covered = 0;
    let without = 0;
    labels.forEach((label, index) => {
      const [width, height] = sizes[index];
      const box = boxes[index];
      let best = null;
      spots(box, width, height, room).forEach(([x, y], rank) => {
        const cost = placed.reduce((sum, other) => sum + overlap(x, y, width, height, other), 0);
        if (best === null || cost + rank < best.cost + best.rank) best = { x, y, rank, cost };
      });
      const crowded = best.cost > 0.05 * width * height || (placed.length >= FEW && covered + width * height > MOST_COVERED * room.width * room.height);
      label.classList.toggle("waiting", crowded && placed.length > 0);
      label.style.translate = `${best.x - box.left}px ${best.y - box.top}px`;
      if (crowded && placed.length > 0) {
        without += 1;
      } else {
        placed.push({ x: best.x, y: best.y, width, height });
        covered += width * height;
      }
    });
    const note = picture.parentNode.querySelector(".unlabelled");
    note.hidden = without === 0;
    note.textContent = `${labels.length - without} of ${labels.length} boxes are labelled, the best first: point at a box for its label.`;
  }

  // Also when a picture is shown for the first time: it had no size before.
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => layOut(entry.target)));
  for (const picture of document.querySelectorAll(".picture")) observer.observe(picture);
  document.documentElement.classList.add("placed");
  return layOut;
})();
