// Achieved rate against arithmetic intensity, under the ceilings measured on this device.
function rooflineFigure(width) {
  const { roof, ceilings } = state.comparison;
  byId("roofline-note").textContent = `${ceilings} Intensity is the arithmetic of direct convolution over the least bytes, parameters and input read once; an algorithm that multiplies less, such as Winograd's, may rise above the roof.`;
  const rows = shownRows().filter((row) => row.measured && row.intensity && row.gflopPerS);
  if (!roof) return { why: "Without both ceilings, arithmetic and memory, there is no roof to draw." };
  if (!rows.length) return { why: state.comparison.mode === "train" ? "A training step's least bytes are another matter: it has no roofline here." : "No row shown here has what a roofline needs." };
  const ridge = roof.gflopPerS / roof.gbPerS;
  const xs = [ridge, ...rows.map((row) => row.intensity)];
  const [left, right] = [Math.min(...xs) / 2, Math.max(...xs) * 2];
  const atMost = (intensity) => Math.min(roof.gflopPerS, roof.gbPerS * intensity);
  const corners = [left, ridge, right];
  const ys = [...rows.map((row) => row.gflopPerS), roof.gflopPerS, atMost(left)];
  const traces = [{ type: "scatter", mode: "lines", x: corners, y: corners.map(atMost), line: { color: css("--text"), width: 1.6 }, hoverinfo: "skip", showlegend: false }];
  for (const own of byLabel(rows)) {
    const trace = points(own, (row) => row.intensity, (row) => row.gflopPerS);
    trace.text = own.map((row) => `${hover(row)}, ${number((100 * row.gflopPerS) / atMost(row.intensity))} % of the roof<br>${number(row.intensity)} FLOP/byte`);
    traces.push({ type: "scatter", mode: "markers", marker: marker(own[0]), ...trace });
  }
  const layout = {
    xaxis: logAxis([left, right], { title: "arithmetic intensity, FLOP/byte" }, 0, width < 500 ? 6 : 9),
    yaxis: logAxis(ys, { title: "achieved, GFLOP/s" }, 0.12),
    margin: { l: 10, r: 14, t: 14, b: 48 },
    annotations: [
      note(`${number(roof.gflopPerS)} GFLOP/s`, { x: Math.log10(ridge), y: Math.log10(roof.gflopPerS), xanchor: "left", yanchor: "bottom", xshift: 4, yshift: 2 }),
      note(`${number(roof.gbPerS)} GB/s`, { x: Math.log10(Math.sqrt(left * ridge)), y: Math.log10(atMost(Math.sqrt(left * ridge))), xanchor: "left", yanchor: "top", xshift: 8 }),
    ],
  };
  return { traces, layout, height: Math.min(520, Math.max(340, width * 0.5)), told: `${count(rows.length, "row")} under the roof of this device.` };
}

register("roofline-figure", rooflineFigure);
