"""Pictures that explain a plan: with matplotlib (``pip install 'cpattn[viz]'``), or as text for a terminal."""

from cpattn.viz.plan_picture import draw_plan_picture
from cpattn.viz.ring_picture import draw_ring_picture
from cpattn.viz.ring_schedule import RingSchedule, Stretch, ring_schedule
from cpattn.viz.ring_text import ring_as_text
from cpattn.viz.work_picture import draw_work_picture
from cpattn.viz.work_text import work_as_text

__all__ = [
    "RingSchedule",
    "Stretch",
    "draw_plan_picture",
    "draw_ring_picture",
    "draw_work_picture",
    "ring_as_text",
    "ring_schedule",
    "work_as_text",
]
