// What both pictures need: sharp pixels, and the colours of the page.

let styles = getComputedStyle(document.documentElement);

export function style(name) {
  return styles.getPropertyValue(name).trim();
}

// A colour for each answer: neighbours are far apart on the wheel.
export function colourOf(answer) {
  return `hsl(${(answer * 137 + 210) % 360} 62% ${style("--cell")})`;
}

// The canvas in CSS pixels, cleared, on screens of any density.
export function prepare(canvas) {
  const density = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * density) || canvas.height !== Math.round(height * density)) {
    canvas.width = Math.round(width * density);
    canvas.height = Math.round(height * density);
  }
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}
