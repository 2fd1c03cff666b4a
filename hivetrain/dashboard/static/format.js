// Figures as people read them. What is unknown is a dash, never a zero.

export const NONE = "–";

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

const known = (value) => value !== null && value !== undefined;

export const integer = (value) => (known(value) ? plain.format(value) : NONE);
export const large = (value) => (known(value) ? (value < 10000 ? plain.format(value) : compact.format(value)) : NONE);
export const tick = (value) => (Math.abs(value) < 1000 ? String(Number(value.toPrecision(6))) : compact.format(value));
export const text = (value) => (known(value) && value !== "" ? String(value) : NONE);
export const loss = (value) => (typeof value === "number" ? value.toFixed(4) : text(value));
export const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : NONE);
export const seconds = (value) => (known(value) ? `${value.toFixed(2)} s` : NONE);
export const bytes = (value) => (known(value) ? `${compact.format(value)}B` : NONE);
export const joules = (value) => (known(value) ? `${compact.format(value)}J` : "not available");

export const duration = (value) => {
  if (!known(value)) return NONE;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} days`;
};

export const clock = (at) => (known(at) ? new Date(1000 * at).toLocaleTimeString("en-GB") : NONE);
export const short = (name) => (known(name) && name.length > 14 ? `${name.slice(0, 5)}…${name.slice(-6)}` : text(name));
