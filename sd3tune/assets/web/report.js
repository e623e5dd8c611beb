"use strict";
// The curves, drawn by uPlot in the colours of the theme, and the slider of the previews.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const probe = document.createElement("span");
  document.body.append(probe);
  probe.hidden = true;

  // light-dark() has a value only where a property uses it, so colours are read from an element.
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const shown = (value) => (value == null ? "" : String(Number(value.toPrecision(4))));

  const series = (one) => ({
    label: one.label,
    stroke: colour(`series-${one.colour}`).replace("rgb(", "rgba(").replace(")", one.style === "faint" ? ", 0.35)" : ", 1)"),
    width: one.style === "faint" ? 1 : 2,
    dash: one.style === "dashed" ? [6, 4] : undefined,
    spanGaps: true,
    points: { show: one.x.length < 40, size: 5 },
    value: (_, value) => shown(value),
  });

  const axis = (more) => ({
    stroke: colour("quiet"),
    grid: { stroke: colour("line"), width: 1 },
    ticks: { stroke: colour("line"), width: 1, size: 4 },
    font: `12px ${getComputedStyle(document.body).fontFamily}`,
    ...more,
  });

  const draw = (chart, place) => {
    place.replaceChildren();
    const tables = chart.series.map((one) => [one.x, one.y]);
    const lastValues = (plot) => plot.setLegend({ idx: plot.data[0].length - 1 }); // until the pointer is over a curve
    return new uPlot(
      {
        width: place.clientWidth,
        height: 240,
        scales: { x: { time: false } },
        cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 7 } },
        legend: { live: true },
        axes: [
          axis({ values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString("en") : "")) }),
          axis({ size: 64, values: (_, ticks) => ticks.map(shown) }),
        ],
        hooks: { ready: [lastValues] },
        series: [{ label: "step" }, ...chart.series.map(series)],
      },
      uPlot.join(tables),
      place,
    );
  };

  const places = [...document.querySelectorAll("[data-chart] .plot")];
  let plots = [];
  const drawAll = () => {
    plots.forEach((plot) => plot.destroy());
    plots = places.map((place) => draw(charts[place.parentElement.dataset.chart], place));
  };
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(() => {
    plots.forEach((plot, number) => {
      const width = places[number].clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: 240 });
    });
  }).observe(document.body);

  const slider = document.getElementById("step");
  if (slider) {
    const steps = slider.dataset.steps.split(",").map(Number);
    slider.addEventListener("input", () => {
      const step = steps[slider.value];
      document.querySelector("output[for=step]").textContent = step;
      for (const figure of document.querySelectorAll(".over-time")) {
        const pictures = [...figure.querySelectorAll("[data-step]")];
        const upTo = pictures.filter((picture) => Number(picture.dataset.step) <= step);
        const now = upTo.at(-1) ?? pictures[0];
        pictures.forEach((picture) => (picture.hidden = picture !== now));
        if (now) figure.querySelector(".shown-step").textContent = now.dataset.step;
      }
    });
  }
})();
