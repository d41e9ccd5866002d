// Numbers as a person reads them.

const MINUS = "−";

/** Three significant digits without an exponent where that stays short; a dash where there is no number. */
export function number(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  const text =
    size >= 1e6 || size < 1e-3
      ? size.toExponential(2)
      : size >= 1000
        ? integer(size)
        : size >= 100
          ? size.toFixed(0)
          : size >= 10
            ? size.toFixed(1)
            : size >= 0.1
              ? size.toFixed(2)
              : size.toPrecision(2);
  return value < 0 ? MINUS + text : text;
}

/** A share as a percentage: 0.00214 -> "0.214 %". */
export function percent(share: number | null | undefined): string {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  const value = 100 * share;
  if (value === 0) return "0 %";
  return `${value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

/** Thousands separated by commas, the same in every locale. */
export function integer(value: number): string {
  return Math.round(value)
    .toString()
    .replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

/** “1 token”, “1,024 tokens”. */
export function counted(count: number, noun: string): string {
  return `${integer(count)} ${noun}${count === 1 ? "" : "s"}`;
}
