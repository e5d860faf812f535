"""How do predictions look on a slide? python docs/draw_slide.py SLIDE RESULT.geojson draws docs/images/slides.png"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

slide, result = map(Path, sys.argv[1:3])
with Image.open(slide) as opened:  # a drawn slide is small: Pillow reads it whole
    picture = opened.convert("RGB")
draw = ImageDraw.Draw(picture)
for feature in json.loads(result.read_text(encoding="utf-8"))["features"]:
    x, y = feature["geometry"]["coordinates"]
    said, annotated = feature["properties"]["classification"], feature["properties"]["metadata"].get("annotated class")
    ring = (x - 60, y - 60, x + 60, y + 60)
    for start in range(0, 360, 30):  # whole where run and annotation agree, dashed where they differ
        draw.arc(ring, start, start + (30 if annotated == said["name"] else 15), fill=tuple(said["color"]), width=5)
    probability = next(v for name, v in feature["properties"]["measurements"].items() if name.startswith("Probability"))
    draw.text((x, y + 66), f"{said['name']} {probability:.2f}", fill=(0, 0, 0), anchor="mt", font_size=18)
picture.save(Path(__file__).parent / "images" / "slides.png", optimize=True)
