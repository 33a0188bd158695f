"""Short texts for durations. No torch here."""


def duration(seconds: float) -> str:
    """`12s`, `3m 05s`, `4h 07m`, `1d 09h`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86_400, whole % 86_400 // 3600, whole % 3600 // 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
