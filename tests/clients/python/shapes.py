"""What structured answers are to hold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city. Each field has an end: a small model finds none by itself."""

    city: str = Field(pattern="^[A-Z][a-z]{0,11}$")
    degrees: int = Field(ge=-60, le=60)
    sky: Literal["clear", "cloudy", "rain"]
