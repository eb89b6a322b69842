// What both pictures need: sharp pixels, and the colours and the type of the page.

let styles = getComputedStyle(document.documentElement);

export function style(name) {
  return styles.getPropertyValue(name).trim();
}

// Converts rem to pixels: pictures grow with the page.
export function rem(count) {
  return count * parseFloat(styles.fontSize);
}

export function type(size, weight = "") {
  return `${weight} ${size}px system-ui, "DejaVu Sans", sans-serif`;
}

// A colour for each answer: neighbours are far apart on the wheel, and all are equally light (oklch), so that all have
// the same contrast to the page.
export function colourOf(answer) {
  return `oklch(${style("--cell")} 0.14 ${(answer * 137 + 250) % 360})`;
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
