"use strict";
// A cursor over every chart that reads out the nearest point of each line: by pointer, touch or arrow keys.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const lines = JSON.parse(figure.dataset.chart).filter((line) => line.points.length);
  const canvas = figure.querySelector(".canvas");
  if (!lines.length) continue;
  const longest = lines.reduce((a, b) => (b.points.length > a.points.length ? b : a));
  const cursor = document.createElement("div");
  const tip = document.createElement("div");
  cursor.className = "cursor";
  tip.className = "tip";
  cursor.hidden = tip.hidden = true;
  canvas.append(cursor, tip);
  let at = longest.points.length - 1;

  const nearest = (points, place) =>
    points.reduce((a, b) => (Math.abs(b[0] - place) < Math.abs(a[0] - place) ? b : a));
  const element = (name, text, className) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  const show = (place) => {
    const anchor = nearest(longest.points, place);
    at = longest.points.indexOf(anchor);
    tip.replaceChildren(element("b", anchor[1]));
    for (const line of lines) {
      const row = element("div", "");
      row.append(element("i", "", "line c" + line.colour), element("span", line.name),
        element("b", nearest(line.points, anchor[0])[2]));
      tip.append(row);
    }
    cursor.hidden = tip.hidden = false;
    cursor.style.left = 100 * anchor[0] + "%";
    const room = canvas.clientWidth - tip.offsetWidth;
    const beside = anchor[0] * canvas.clientWidth + (anchor[0] < 0.5 ? 12 : -12 - tip.offsetWidth);
    tip.style.left = Math.max(Math.min(beside, room), Math.min(0, room)) + "px";
  };
  const hide = () => { cursor.hidden = tip.hidden = true; };

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    show((event.clientX - box.left) / box.width);
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.min(Math.max(at + (tip.hidden ? 0 : move), 0), longest.points.length - 1);
    show(longest.points[at][0]);
  });
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}
