"use strict";
// What the reader has chosen: it is kept in the address, so that a link shows the same, and everything follows it.
const page = {
  state: {},
  defaults: {},
  followers: [],

  // A choice, its default, and which of its values there are.
  define(name, value, exists) {
    page.defaults[name] = page.state[name] = value;
    page.followers.exists = { ...page.followers.exists, [name]: exists };
  },

  set(changes) {
    Object.assign(page.state, changes);
    for (const follower of page.followers) follower(page.state, changes);
    const chosen = Object.entries(page.state).filter(([name, value]) => value !== page.defaults[name]);
    const text = new URLSearchParams(chosen.map(([name, value]) => [name, value === true ? 1 : value === false ? 0 : value]));
    try {
      history.replaceState(null, "", `#${text}`);
    } catch {
      // A frame within a notebook has no address of its own.
    }
  },

  // The choices in the address; #c3 is the short form of #step=3.
  follow() {
    const short = /^#c(\d+)$/.exec(location.hash);
    const given = new URLSearchParams(short ? `step=${short[1]}` : location.hash.slice(1));
    const chosen = short ? {} : { ...page.defaults };
    for (const [name, text] of given) {
      const kind = typeof page.defaults[name];
      const value = kind === "number" ? Number(text) : kind === "boolean" ? text === "1" : text;
      if (kind !== "undefined" && page.followers.exists[name](value)) chosen[name] = value;
    }
    page.set(chosen);
  },
};
window.addEventListener("hashchange", () => page.follow());
