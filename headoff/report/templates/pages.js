// Links to the other pages of a folder.
{
  const nav = document.getElementById("pages");
  for (const [kind, words] of [["prev", "← "], ["index", ""], ["next", ""]]) {
    const link = document.head.querySelector(`link[rel=${kind}]`);
    if (!link) continue;
    const anchor = document.createElement("a");
    anchor.href = link.getAttribute("href");
    anchor.rel = kind;
    anchor.textContent = `${words}${link.title}${kind === "next" ? " →" : ""}`;
    nav.append(anchor);
    nav.hidden = false;
  }
}
