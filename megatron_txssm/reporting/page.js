"use strict";
// Shows the values of each curve at the pointer. The charts are complete without it.
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.querySelector("script").textContent);
  const [first, last] = data.range;
  const line = add("at"), tip = add("tip");
  const text = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 });

  function add(name) {
    const part = plot.appendChild(document.createElement("div"));
    part.className = name;
    part.hidden = true;
    return part;
  }

  // The index of the value of a sorted list that is nearest to x.
  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  }

  function row(curve, index) {
    const part = document.createElement("div");
    part.className = "c" + curve.color;
    part.appendChild(document.createElement("i"));
    part.append(curve.name + " ");
    part.appendChild(document.createElement("b")).textContent = text(curve.y[index]);
    if (curve.low[index] < curve.high[index]) part.append(` (${text(curve.low[index])} – ${text(curve.high[index])})`);
    return part;
  }

  function show(event) {
    const box = plot.getBoundingClientRect();
    const x = first + (last - first) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    // Curves that begin later or have ended have no value here.
    const near = (last - first) / 100;
    const here = data.curves.filter(({ x: xs }) => x > xs[0] - near && x < xs[xs.length - 1] + near);
    // The pointer snaps to the value that is nearest to it.
    const found = here.map((curve) => [curve, nearest(curve.x, x)]);
    if (!found.length) return;
    const at = found.map(([curve, index]) => curve.x[index]).reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const share = (at - first) / (last - first);
    const title = document.createElement("div");
    title.textContent = `${data.x} ${text(Math.round(at))}`;
    tip.replaceChildren(title, ...found.map(([curve, index]) => row(curve, index)));
    line.hidden = tip.hidden = false;
    line.style.left = `${100 * share}%`;
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 12px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + 12px)`;
  }

  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { line.hidden = tip.hidden = true; });
}
