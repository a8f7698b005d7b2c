"use strict";
// Names and captions come from files: they are set as text, never as HTML.

const id = (name) => document.getElementById(name);
const percent = (input) => `${input.value} %`;
const share = (input) => (input.value / 100).toFixed(2);
const view = () => document.querySelector("[name=view]:checked").value;
let asked = null; // an image that is searched for: {row, name} or {file, name}
let found = [], shown = -1, hasText = true;
const newest = {}; // of each kind of request: answers to earlier ones are dropped

async function ask(kind, path, options) {
  const number = (newest[kind] = (newest[kind] || 0) + 1);
  let answer;
  try {
    const response = await fetch(path, options);
    answer = await response.json();
  } catch {
    answer = {error: "no answer: is aclip serve still running?"};
  }
  return number === newest[kind] ? answer : null;
}

function after(milliseconds, action) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(action, milliseconds); };
}

function say(words, error = false) {
  id("status").textContent = words;
  id("status").classList.toggle("error", error);
}

function cell(hit, action) {
  const item = document.createElement("li"), button = document.createElement("button");
  const image = document.createElement("img"), words = document.createElement("span");
  const note = document.createElement("small");
  button.type = "button";
  image.loading = "lazy";
  image.src = `image/${hit.row}`;
  image.alt = hit.caption || hit.name;
  words.textContent = hit.caption || hit.name;
  note.textContent = hit.similarity === null ? "" : hit.similarity.toFixed(3);
  button.title = hit.name;
  button.append(image, words, note);
  button.addEventListener("click", action);
  item.append(button);
  return item;
}

function similarTo(query, keep, top, kind) {
  if (query.file) {
    return ask(kind, `api/upload?keep=${keep}&top=${top}`, {method: "POST", body: query.file});
  }
  return ask(kind, `api/similar/${query.row}?keep=${keep}&top=${top}`);
}

async function search() {
  const start = performance.now();
  say("searching ...");
  const parameters = new URLSearchParams({text: id("text").value, without: id("without").value, top: 48});
  const answer = asked ? await similarTo(asked, share(id("keep")), 48, "grid")
    : await ask("grid", `api/search?${parameters}`);
  if (!answer) return;
  id("grid").setAttribute("aria-busy", "false");
  if (answer.error) { say(answer.error, true); return; }
  found = answer.hits;
  id("grid").replaceChildren(...found.map((hit, place) => cell(hit, () => open(place))));
  const ranked = asked || id("text").value.trim();
  if (!ranked && id("without").value.trim()) { say("a text to leave out needs one to search for, too"); return; }
  say(ranked ? `the ${found.length} most similar, in ${((performance.now() - start) / 1000).toFixed(2)} s`
    : `${found.length} of the images: type a text, or drop an image`);
}

function searchFor(query) {
  if (asked && asked.address) URL.revokeObjectURL(asked.address);
  asked = query;
  id("query").hidden = !query;
  if (query) {
    if (query.file) query.address = URL.createObjectURL(query.file);
    id("asked").src = query.address || `image/${query.row}`;
    id("asked-name").textContent = query.name;
    id("text").value = id("without").value = "";
  }
  search();
}

function open(place) {
  shown = place;
  const hit = found[place];
  id("caption").textContent = hit.caption;
  id("name").textContent = hit.name;
  id("picture").alt = hit.caption || hit.name;
  if (!id("large").open) {
    id("where").value = id("text").value;
    id("large").showModal();
  }
  look();
  rank();
}

function look() {
  const row = found[shown].row, text = id("where").value.trim();
  const parameters = new URLSearchParams(view() === "map" ? {text} : {keep: share(id("large-keep"))});
  id("scale").hidden = view() !== "map" || !text;
  id("picture").src = view() === "kept" || (view() === "map" && text) ? `look/${row}?${parameters}`
    : `image/${row}?large`;
}

async function rank() {
  const hit = found[shown], kept = view() === "kept";
  id("by").textContent = kept ? "Similar, by the patches kept" : "Similar";
  const answer = await similarTo(hit, kept ? share(id("large-keep")) : "1", 9, "similar");
  if (!answer) return;
  if (answer.error) { id("similar").textContent = answer.error; return; }
  const others = answer.hits.filter((other) => other.row !== hit.row).slice(0, 8);
  id("similar").replaceChildren(...others.map((other) => cell(other, () => {
    found = [...found, other];
    open(found.length - 1);
  })));
}

function choose(name) {
  document.querySelector(`[name=view][value=${name}]`).checked = true;
  look();
  rank();
}

id("form").addEventListener("submit", (event) => { event.preventDefault(); searchFor(null); });
id("clear").addEventListener("click", () => { searchFor(null); id("text").focus(); });
id("file").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file) searchFor({file, name: file.name});
  event.target.value = "";
});
id("keep").addEventListener("input", () => { id("share").textContent = percent(id("keep")); });
id("keep").addEventListener("input", after(150, search));
id("large-keep").addEventListener("input", () => { id("large-share").textContent = percent(id("large-keep")); });
id("large-keep").addEventListener("input", after(150, () => { choose("kept"); }));
id("where").addEventListener("input", after(300, () => choose("map")));
for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => choose(radio.value));
id("close").addEventListener("click", () => id("large").close());
id("more").addEventListener("click", () => { const hit = found[shown]; id("large").close(); searchFor(hit); });
id("large").addEventListener("click", (event) => { if (event.target === id("large")) id("large").close(); });
id("large").addEventListener("keydown", (event) => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!step || event.target.tagName === "INPUT") return;
  if (found[shown + step]) open(shown + step);
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", () => document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) searchFor({file, name: file.name});
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData.files[0];
  if (file) searchFor({file, name: file.name});
});

(async () => {
  const about = await ask("about", "api/index");
  if (about && !about.error) {
    document.title = `${about.name} - aclip search`;
    hasText = about.has_text;
    for (const element of [id("text"), id("without"), ...document.querySelectorAll(".map")]) element.hidden = !hasText;
    id("facts").replaceChildren(...about.facts.flatMap(([name, value]) => {
      const term = document.createElement("dt"), description = document.createElement("dd");
      term.textContent = name;
      description.textContent = value;
      return [term, description];
    }));
  }
  search();
})();
