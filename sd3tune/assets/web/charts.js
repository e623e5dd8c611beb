// Curves, drawn with uPlot in the colours of the page.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const drawn = new Map();

/** Draw curves into an element, or update them: `x` values, and for each name an array of as many values. */
export function chart(place, x, curves, options = {}) {
  const { xLabel = "step", height = 240, points = false } = options;
  const names = Object.keys(curves);
  const data = [x, ...Object.values(curves)];
  const known = drawn.get(place);
  if (known?.names.join() === names.join()) {
    known.plot.setData(data);
    return;
  }
  known?.plot.destroy();
  place.replaceChildren();
  if (!x.length) return;
  const colours = ["accent", "soft", "good", "warm", "bad"].map(colour);
  const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line") } };
  const series = names.map((name, number) => ({
    label: name, stroke: name === "each step" ? `${colours[1]}66` : colours[number % colours.length], spanGaps: true,
    width: name === "each step" ? 1 : 2, points: { show: points }, value: (_, value) => (value === null || value === undefined ? "" : value.toPrecision(4)),
    dash: name === "base" ? [6, 4] : undefined,
  }));
  const plot = new window.uPlot({
    width: place.clientWidth || 400, height, scales: { x: { time: false } }, cursor: { y: false },
    axes: [{ ...axis }, { ...axis, size: 58 }], series: [{ label: xLabel }, ...series], legend: { live: true },
  }, data, place);
  drawn.set(place, { plot, names, options });
  resized.observe(place);
}

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const plot = drawn.get(target)?.plot;
    if (plot && target.clientWidth) plot.setSize({ width: target.clientWidth, height: plot.height });
  }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { // a canvas keeps its colours
  for (const [place, { plot, names, options }] of [...drawn]) {
    drawn.delete(place);
    plot.destroy();
    chart(place, plot.data[0], Object.fromEntries(names.map((name, number) => [name, plot.data[number + 1]])), options);
  }
});

/** Exponentially smoothed values, without a bias towards the first ones. */
export function smoothed(values, keep) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return weight ? sum / weight : null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

/** Of long curves, every n-th point is drawn. */
export function thinned(length, most = 4000) {
  const each = Math.ceil(length / most) || 1;
  return Array.from({ length: Math.ceil(length / each) }, (_, number) => number * each);
}
