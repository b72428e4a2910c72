"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const printing = matchMedia("print");
  const key = "loupe-report:" + document.title;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const say = (text) => { document.getElementById("status").textContent = text; };

  // -------------------------------------------------------------------------------------------------- place of the reader
  // a file that is opened from a disk may have no storage: then a live page begins at its top each time
  const remembered = () => { try { return JSON.parse(sessionStorage.getItem(key)) || {}; } catch { return {}; } };
  const kept = data.liveS ? remembered() : {};
  const ranges = kept.ranges || {};
  const remember = () => {
    const state = {
      y: scrollY, ranges,
      scale: scale(), smooth: smooth(),
      sliders: [...document.querySelectorAll("input[type=range]")].map((s) => s.value === s.max ? "last" : s.dataset.orders.split(" ")[s.value]),
      open: [...document.querySelectorAll("details")].map((d) => d.open),
      focus: document.activeElement ? [...document.querySelectorAll("input,button,summary,a,[tabindex]")].indexOf(document.activeElement) : -1,
    };
    try { sessionStorage.setItem(key, JSON.stringify(state)); } catch { /* as said above */ }
  };

  // ------------------------------------------------------------------------------------------------------------ pictures
  const show = (slider) => {
    const orders = slider.dataset.orders.split(" ").map(Number);
    const label = slider.dataset.labels.split("|")[slider.value];
    const at = orders[slider.value];
    const player = slider.closest(".player");
    player.querySelector("output").textContent = label;
    slider.setAttribute("aria-valuetext", label);
    for (const box of player.querySelectorAll(".frames")) {
      const images = [...box.querySelectorAll("img")];
      const before = images.filter((i) => Number(i.dataset.order) <= at);
      const chosen = before.length ? before[before.length - 1] : images[0];
      for (const image of images) image.hidden = image !== chosen;
    }
    const buttons = player.querySelectorAll("button");
    buttons[0].disabled = slider.value === slider.min;
    buttons[1].disabled = slider.value === slider.max;
  };
  document.querySelectorAll("input[type=range]").forEach((slider, i) => {
    const was = kept.sliders && kept.sliders[i];
    const at = slider.dataset.orders.split(" ").indexOf(String(was));
    if (at >= 0) slider.value = at;
    slider.addEventListener("input", () => show(slider));
    for (const button of slider.closest(".player").querySelectorAll("button"))
      button.addEventListener("click", () => { slider.value = Number(slider.value) + Number(button.dataset.by); show(slider); });
    show(slider);
  });
  if (kept.open) document.querySelectorAll("details").forEach((d, i) => { if (i in kept.open) d.open = kept.open[i]; });

  // -------------------------------------------------------------------------------------------------------------- charts
  const smoothBox = document.getElementById("smooth");
  const scaleBoxes = [...document.querySelectorAll("input[name=scale]")];
  if (kept.scale) for (const box of scaleBoxes) box.checked = box.value === kept.scale;
  if (smoothBox && "smooth" in kept) smoothBox.checked = kept.smooth;
  const scale = () => { const box = scaleBoxes.find((b) => b.checked); return box ? box.value : "log"; };
  const smooth = () => !smoothBox || smoothBox.checked;

  const colour = (chart, i) => {
    if (chart.scale === "sequential") {
      const share = i / Math.max(1, chart.traces.length - 1);
      return dark.matches ? `hsl(226 80% ${88 - 42 * share}%)` : `hsl(226 65% ${76 - 50 * share}%)`;
    }
    return i < 0 ? css(i === -1 ? "--line-strong" : "--c8") : css("--c" + (i % 12));
  };
  const hover = (unit) => "%{y:.4~g}" + (unit ? " " + unit : "");

  const traces = (chart) => chart.traces.flatMap((t) => {
    const line = { color: colour(chart, t.colour), width: 1.8 };
    const base = { x: t.x, type: "scatter", mode: t.dots || t.x.length < 2 ? "lines+markers" : "lines", name: t.name, legendgroup: t.name, line };
    if (chart.stacked) return [{ ...base, y: t.y, stackgroup: "all", line: { ...line, width: 0.5 }, fillcolor: line.color, hovertemplate: hover(chart.unit) }];
    if (t.smooth && smooth()) return [
      { ...base, y: t.y, line: { ...line, width: 1 }, opacity: 0.28, hoverinfo: "skip", showlegend: false },
      { ...base, y: t.smooth, hovertemplate: hover(chart.unit) },
    ];
    return [{ ...base, y: t.y, hovertemplate: hover(chart.unit) }];
  });

  const axis = (more) => ({
    gridcolor: css("--line"), zeroline: false, linecolor: css("--line-strong"), tickcolor: css("--line-strong"),
    tickfont: { size: 11 }, exponentformat: "none", automargin: true, fixedrange: coarse.matches, ...more,
  });

  const shapes = (chart) => {
    if (!data.single) return { shapes: [], annotations: [] };
    const bands = data.bands || [], list = [], notes = [];
    bands.forEach((band, i) => {
      if (i % 2) list.push({ type: "rect", layer: "below", yref: "paper", x0: band.from, x1: band.to, y0: 0, y1: 1, line: { width: 0 }, fillcolor: css("--band") });
      if (chart.wide && innerWidth > 700 && bands.length < 9)
        notes.push({ x: (band.from + band.to) / 2, y: 1, yref: "paper", yanchor: "bottom", text: band.name, showarrow: false, font: { size: 11, color: css("--muted") } });
    });
    for (const mark of data.marks || [])
      list.push({ type: "line", yref: "paper", x0: mark.step, x1: mark.step, y0: 0, y1: 1, line: { width: 1, dash: "dot", color: css("--warn") } });
    return { shapes: list, annotations: notes };
  };

  // plotly's own labels of a logarithmic axis leave digits without their power
  const ticks = (chart) => {
    const all = chart.traces.flatMap((t) => t.y.filter((v) => v !== null));
    const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
    const decades = Math.log10(high / low);
    if (decades < 0.6) return {};
    const factors = decades > 3 ? [1] : [1, 2, 5], every = Math.max(1, Math.round(decades / 6)), values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every)
      for (const factor of factors) values.push(Number((factor * 10 ** power).toPrecision(1)));
    return { tickvals: values, ticktext: values.map((v) => (v >= 1e-4 && v < 1e5 ? String(v) : v.toExponential(0))) };
  };

  const layout = (chart, height) => {
    const log = chart.log && scale() === "log" && chart.traces.every((t) => t.y.every((v) => v === null || v > 0));
    const many = chart.traces.length > 1;
    const y = axis({ type: log ? "log" : "linear", nticks: 6, fixedrange: true, ...(log ? ticks(chart) : {}) });
    if (chart.range) y.range = chart.range;
    else if (chart.zero && !log) y.rangemode = "tozero";
    const x = axis({ nticks: innerWidth < 600 ? 5 : 8, title: { text: "step", font: { size: 11, color: css("--muted") }, standoff: 6 } });
    if (data.lastStep) x.range = [0, data.lastStep];
    const was = ranges[chart.id];
    if (was) { x.range = was.slice(); x.autorange = false; }
    return {
      height, ...(printing.matches ? { width: PAPER_PX, autosize: false } : {}), margin: { l: 8, r: 12, t: chart.wide ? 26 : 10, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font"), size: 12, color: css("--ink") }, xaxis: x, yaxis: y, hovermode: "x unified",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line-strong"), font: { color: css("--ink"), size: 12 } },
      showlegend: many, legend: { orientation: "h", xref: "container", x: 0, yref: "container", y: 0, yanchor: "bottom", font: { size: 11.5 }, itemwidth: 30 },
      dragmode: coarse.matches ? false : "zoom", ...shapes(chart),
    };
  };
  const PAPER_PX = 720;  // about what a page has; style scales it to the page
  const fit = (box) => {
    const { width, height } = box._fullLayout;
    for (const svg of box.querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    box.querySelector(".svg-container").style.setProperty("--ratio", `${width} / ${height}`);
  };
  const settings = { responsive: true, displayModeBar: false, doubleClick: "reset" };

  const heightOf = (chart) => {
    const lines = chart.traces.length > 1 ? Math.ceil(chart.traces.length / (innerWidth < 700 ? 3 : 5)) : 0;
    return (chart.wide ? (innerWidth < 700 ? 280 : 340) : 240) + 20 * lines;
  };

  const draw = async (chart) => {
    const box = document.getElementById("chart-" + chart.id);
    if (!box) return;
    const first = !box.classList.contains("js-plotly-plot");
    await Plotly.react(box, traces(chart), layout(chart, heightOf(chart)), settings);
    fit(box);
    if (first) box.on("plotly_afterplot", () => fit(box));
    if (first) box.on("plotly_relayout", (change) => {
      if ("xaxis.range[0]" in change) ranges[chart.id] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      else if (change["xaxis.autorange"]) delete ranges[chart.id];
    });
  };

  const symbols = { preempted: "triangle-up", crash: "x", hang: "square", "roll back": "triangle-left", skipped: "circle-open", resumed: "diamond", ended: "circle" };
  const drawTimeline = async () => {
    const box = document.getElementById("timeline");
    if (!box || !data.timeline || !data.timeline.segments.length) return;
    const phases = new Map([["starting", []], ...data.timeline.phases.map((phase) => [phase, []]), ["saving, ending", []]]);
    for (const s of data.timeline.segments) phases.get(s.phase).push(s);
    const list = [...phases].filter(([, of]) => of.length).map(([phase, of]) => ({
      type: "bar", orientation: "h", name: phase, y: of.map(() => "runs"), base: of.map((s) => s.from), width: 0.62,
      x: of.map((s) => new Date(s.to.replace(" ", "T")) - new Date(s.from.replace(" ", "T"))),
      marker: { color: colour({}, of[0].colour), line: { width: 0 } },
      customdata: of.map((s) => [s.start, s.from.slice(0, 19), s.to.slice(0, 19)]),
      hovertemplate: phase + ", start %{customdata[0]}<br>%{customdata[1]} to %{customdata[2]}<extra></extra>",
    }));
    const kinds = new Map();
    for (const e of data.timeline.events) { if (!kinds.has(e.kind)) kinds.set(e.kind, []); kinds.get(e.kind).push(e); }
    for (const [kind, of] of kinds) list.push({
      type: "scatter", mode: "markers", name: kind, x: of.map((e) => e.time), y: of.map(() => "events"),
      marker: { symbol: symbols[kind] || "circle", size: 11, color: css(["crash", "hang"].includes(kind) ? "--bad" : ["preempted", "roll back", "skipped"].includes(kind) ? "--warn" : "--muted") },
      text: of.map((e) => e.text), hovertemplate: "%{text}<br>%{x}<extra></extra>",
    });
    const look = {
      ...layout({ traces: list, id: "timeline" }, innerWidth < 700 ? 190 : 170), barmode: "overlay", hovermode: "closest",
      xaxis: axis({ type: "date", nticks: innerWidth < 600 ? 4 : 9 }),
      yaxis: axis({ type: "category", categoryarray: ["runs", "events"], categoryorder: "array", showgrid: false, fixedrange: true, range: [-0.6, 1.5] }),
      shapes: [], annotations: [],
    };
    const first = !box.classList.contains("js-plotly-plot");
    await Plotly.react(box, list, look, settings);
    fit(box);
    if (first) box.on("plotly_afterplot", () => fit(box));
  };

  const drawAll = async () => {
    await drawTimeline();
    for (const chart of data.charts) {
      await draw(chart);
      await new Promise((go) => setTimeout(go, 0));
    }
  };

  const unpack = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  const main = async () => {
    if (typeof DecompressionStream === "undefined") { say("This browser is too old to draw the charts; those of 2023 and later can."); return; }
    await unpack();
    await drawAll();
    for (const box of [...scaleBoxes, smoothBox].filter(Boolean)) box.addEventListener("change", drawAll);
    dark.addEventListener("change", drawAll);
    // a printer waits for nothing: all at once, in the colours that it has by now
    printing.addEventListener("change", () => { drawTimeline(); for (const chart of data.charts) draw(chart); });
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
    if (kept.y) scrollTo(0, kept.y);
    if (kept.focus >= 0) { const it = document.querySelectorAll("input,button,summary,a,[tabindex]")[kept.focus]; if (it) it.focus({ preventScroll: true }); }
    document.documentElement.dataset.drawn = "yes";
  };

  // ---------------------------------------------------------------------------------------------------------------- live
  const again = () => { remember(); location.reload(); };
  const wait = () => {
    if (data.liveS) setTimeout(() => {
      if (!document.hidden) again();
      else document.addEventListener("visibilitychange", again, { once: true });
    }, data.liveS * 1000);
  };

  // the time runs from when all is drawn: a slow machine must not load it again and again and never show it
  main().catch((error) => { console.error(error); say("The charts cannot be drawn: " + error.message); }).finally(wait);
})();
