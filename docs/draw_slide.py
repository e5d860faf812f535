"""How do points look on a slide? python docs/draw_slide.py SLIDE POINTS.geojson OUT.png

Rings have the colour of the class. Of predictions (`fm-predict --format geojson`) the probability stands below, and a
ring is dashed where the figure was annotated otherwise. docs/images/slides.png is a drawn slide's.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

slide, points, out = map(Path, sys.argv[1:4])
with Image.open(slide) as opened:  # a drawn slide is small: Pillow reads it whole
    picture = opened.convert("RGB")
draw = ImageDraw.Draw(picture)
for feature in json.loads(points.read_text(encoding="utf-8"))["features"]:
    x, y = feature["geometry"]["coordinates"]
    known = feature["properties"]
    said, annotated = known["classification"], known.get("metadata", {}).get("annotated class")
    dash = 30 if annotated in (None, said["name"]) else 15
    for start in range(0, 360, 30):
        draw.arc((x - 60, y - 60, x + 60, y + 60), start, start + dash, fill=tuple(said["color"]), width=5)
    measured = [value for name, value in known.get("measurements", {}).items() if name.startswith("Probability")]
    text = said["name"] + "".join(f" {value:.2f}" for value in measured[:1])
    draw.text((x, y + 66), text, fill=(0, 0, 0), anchor="mt", font_size=18)
picture.quantize(192).save(out, optimize=True)
