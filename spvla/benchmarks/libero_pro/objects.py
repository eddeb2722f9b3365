"""LIBERO-PRO's objects: other files, handled in every respect as an object of LIBERO's is.

How one is turned when it is placed, and what opens or lights it, was compared with LIBERO-PRO's own classes.
"""

LIKES = {
    "bigger_akita_black_bowl": "akita_black_bowl",
    "bigger_alphabet_soup": "alphabet_soup",
    "black_bowl": "akita_black_bowl",
    "blue_ketchup": "alphabet_soup",  # upright, where LIBERO's own ketchup is turned twice
    "brown_rack": "wine_rack",
    "green_bbq_sauce": "bbq_sauce",
    "green_butter": "butter",
    "green_chocolate_pudding": "chocolate_pudding",
    "red_alphabet_soup": "alphabet_soup",
    "red_basket": "basket",
    "red_cream_cheese": "cream_cheese",
    "red_salad_dressing": "salad_dressing",
    "white_bottle": "wine_bottle",
    "white_porcelain_mug": "porcelain_mug",
    "yellow_cabinet": "wooden_cabinet",
    "yellow_milk": "alphabet_soup",  # as blue_ketchup
    "yellow_moka_pot": "moka_pot",
    "yellow_plate": "plate",
    "yellow_stove": "flat_stove",
    "yellow_tomato_sauce": "tomato_sauce",
}
