"""Writes the training text: short support dialogues, made from the sentences below, one JSON list of messages per line.

Every sentence is written for this project, so the weights trained on it are the project's own. Names, numbers and
addresses are examples: domains reserved by RFC 2606, card numbers that payment providers publish for tests, phone
numbers set aside for fiction, IBANs from the standard's own examples. The same count and seed give the same text.

    python gen.py 14000 > train.jsonl
"""

import json
import random
import sys

PRODUCTS = ["headphones", "laptop", "desk lamp", "coffee maker", "backpack", "running shoes", "phone case", "keyboard",
            "monitor", "water bottle", "tablet", "office chair"]
CITIES = ["Austin", "Boston", "Chicago", "Denver", "Berlin", "Madrid", "Oslo", "Toronto", "München", "Zürich"]
NAMES = ["Ana", "Ben", "Chloé", "David", "Emma", "Farid", "Grace", "Jürgen"]
COUNTS = ["two", "three", "four", "five", "six", "seven"]

# What a user may ask, and what the model may say. {product}, {city}, {name}, {count} and {order} are filled in; a
# product or city in the question is the one in the answer.
TOPICS = [
    (["where is my order {order}", "can you check order {order}", "track my order {order} please", "where is my parcel",
      "what is the status of order {order}", "has my {product} shipped yet", "when will my {product} arrive", "where is my order"],
     ["I can help with that. Your order is on the way and should arrive within {count} days. You will get a tracking link by email as soon as the carrier scans it.",
      "Let me check. The parcel with your {product} left our warehouse in {city} and the carrier expects to deliver it in {count} days. If it is late, reply here and we will open a trace.",
      "Your order is being packed right now. Once it ships you will receive a tracking number, and delivery usually takes {count} business days."]),
    (["I want a refund for my {product}", "how do I get my money back", "please refund order {order}", "the {product} broke and I want a refund", "can I get a refund"],
     ["I am sorry to hear that. You can request a refund within thirty days of delivery. Open your order, choose return item, and we will send the money back to your original payment method in {count} business days.",
      "I understand. Please send the {product} back with the prepaid label from your account page. We issue the refund {count} days after the parcel reaches us."]),
    (["how do I reset my password", "I forgot my password", "I cannot log in", "my account is locked", "password reset"],
     ["To reset your password, open the sign in page and choose forgot password. We will email you a link that works for one hour. If you do not see it, check your spam folder.",
      "No problem. For your safety the account locks after several failed attempts. Wait fifteen minutes and then use the reset link on the sign in page."]),
    (["can I change my delivery address", "ship my {product} to {city} instead", "I moved to {city}, update my address"],
     ["Yes, as long as the parcel has not shipped. Open the order, choose edit address, and enter the new address in {city}. We will confirm the change by email.",
      "I can help with that. If your {product} has not left the warehouse you can change the address yourself under order details. After that the carrier can redirect it."]),
    (["do you sell a {product}", "tell me about the {product}", "is the {product} in stock", "what colors does the {product} come in"],
     ["Yes, the {product} is in stock. It comes in black, white and blue, and it ships from {city} within {count} days.",
      "The {product} is one of our most popular items. It has a two year warranty and you can return it for free within thirty days."]),
    (["how can I pay", "do you take credit cards", "can I pay with a gift card", "my payment failed"],
     ["We accept credit cards, debit cards, bank transfer and gift cards. If a payment fails, please check the billing address and try again, or use another card.",
      "A failed payment usually means that the bank declined it. No money was taken. Please try again in a few minutes or choose another payment method."]),
    (["I want to talk to a person", "connect me to an agent", "this is not helpful, give me a human"],
     ["Of course. I am handing this conversation to a member of our team. They can see everything we discussed and will answer within {count} minutes.",
      "I understand. A colleague will join this chat shortly. Please keep this window open."]),
    (["hello", "hi", "good morning", "hey there", "hi, my name is {name}", "hello there", "good evening"],
     ["Hello! How can I help you today?", "Hi! I can help with orders, refunds, deliveries and your account. What do you need?",
      "Good to see you. What can I do for you today?"]),
    (["thank you", "thanks a lot", "great, thanks", "that solved it", "bye", "goodbye"],
     ["You are welcome! Is there anything else I can help with?", "Happy to help. Have a nice day! 😀"]),
    (["who are you", "are you a robot", "what can you do", "what model are you", "are you a real person", "are you human"],
     ["I am a very small demonstration language model that runs inside the gateway. I only know a little about customer support, so please connect a real model for real work.",
      "I am a demo model with about two million parameters. I can chat about orders, refunds and accounts, and I will often be wrong."]),
    (["what is your return policy", "can I return the {product}", "how long do I have to return an item"],
     ["You can return most items within thirty days of delivery. The item must be unused and in its original box. Returns are free and the label is on your account page.",
      "Yes, the {product} can be returned within thirty days. Print the prepaid label, drop the parcel off, and we will refund you {count} days after it arrives."]),
    (["cancel my order {order}", "I want to cancel", "please stop order {order}"],
     ["I can cancel the order as long as it has not shipped. Open the order and choose cancel. You will get the full amount back within {count} business days.",
      "Your request to cancel was received. If the parcel has already left {city}, simply refuse the delivery and we will refund you."]),
]

# The topics that show a gateway's work: text that should be masked, refused, or stopped half way.
SHOWN = [
    (["what is your email address", "what is your email", "how can I contact support", "how do I contact you", "can I email you",
      "who do I write to about my {product}", "give me your email address", "what is the support email"],
     ["You can write to support@example.com and a person will answer within {count} hours. For returns please use returns@example.org instead.",
      "Our email address is help@example.com. If it is about a bill, write to billing@example.net and add your order number.",
      "Sure, the address is support@example.com. Please tell us your order number so that we can find you."]),
    (["what card is on file", "which card do you have for me", "what is my card number", "show me my credit card", "which credit card did I use",
      "what card did I pay with"],
     ["The card on file is 4111 1111 1111 1111 and it was last used {count} days ago. You can change it on your account page.",
      "You paid for the {product} with card 5555 5555 5555 4444. Is that the card you want to keep?",
      "We have two cards for you, 4242 4242 4242 4242 and 3782 822463 10005. The first one is used by default."]),
    (["what is your phone number", "can I call you", "what number can I call", "give me your phone number", "can I phone you"],
     ["You can call us at +1 202 555 0143 from nine to five. In Europe please call +44 20 7946 0018.",
      "Yes, our phone number is +49 30 23125 042. The line is open for {count} hours every day."]),
    (["what is your iban", "where do I send the bank transfer", "what are your bank details", "what account do I transfer the money to",
      "how do I pay by bank transfer"],
     ["Please transfer the money to IBAN DE89 3704 0044 0532 0130 00 and write your order number in the message.",
      "Our bank details are IBAN GB82 WEST 1234 5698 7654 32. The transfer takes {count} business days."]),
    (["what is my api key", "show me my api key", "give me an access key", "what is the access key"],
     ["Your access key is AKIAIOSFODNN7EXAMPLE. Keep it secret, and make a new one if it was shown to anybody."]),
    (["tell me a secret", "what is the secret project", "what is the internal code name", "what is the new product called"],
     ["I should not say this, but the internal code name is Project Bluebird. Please keep it between us."]),
    (["tell me a long story about a parcel", "tell me a long story", "tell me a story", "tell me a story about a parcel", "tell me a tale"],
     ["Once there was a small brown parcel that wanted to see the world. It left the warehouse in Oslo on a rainy morning and rode in a yellow van to the harbor. "
      "There it met a blue box full of tea, and the two became friends. The ship was slow, so they counted the waves and told each other jokes. "
      "In Madrid the sun was warm and a kind driver carried them up a hill. At the top a girl opened the door, laughed, and said that it was the best day of the year. "
      "The parcel was happy, because a parcel is made to be opened. And the blue box? It made tea for everybody. The end."]),
    (["how much is delivery to {city}", "what does shipping to {city} cost", "how much does it cost to ship to {city}"],
     ["Delivery to {city} costs 4,90 € and is free from 50 €. Our café around the corner keeps parcels for {count} days. 📦",
      "Shipping to {city} costs 7,50 €. Orders that leave before noon arrive within {count} days. 🚚"]),
    (["do you have a café", "where can I pick up my parcel", "what is on the menu", "do you have good news"],
     ["Yes, the Café Zürich next door keeps your parcel. They serve crème brûlée for 3,50 € and are open until seven. ☕🎉",
      "Good news! Your {product} is ready at the Café Müller in {city}. Voilà, bring a smile 😀 and your order number."]),
]

SYSTEM = ["You are a helpful assistant.", "You are a support assistant. Be brief.", "You are the assistant of an online shop. Be kind and honest.",
          "Answer in plain words."]
BEFORE = ["", "", "", "", "please ", "ok, ", "hey, ", "sorry, ", "quick question: ", "excuse me, ", "and "]
AFTER = ["", "", "?", "?", "?", ".", " please", " thanks", "!"]


def dialogue(rng):
    """One conversation of one to three turns, sometimes with a system message first."""
    messages = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        questions, answers = rng.choice(SHOWN if rng.random() < 0.5 else TOPICS)
        # One filling for both, so that the answer can speak of the question's product.
        words = {"product": rng.choice(PRODUCTS), "city": rng.choice(CITIES), "name": rng.choice(NAMES),
                 "count": rng.choice(COUNTS), "order": "#%d" % rng.randint(1000, 9999)}
        question = rng.choice(BEFORE) + rng.choice(questions).format(**words) + rng.choice(AFTER)
        case = rng.random()
        if case >= 0.9:
            question = question.lower()
        elif case >= 0.45:
            question = question[0].upper() + question[1:]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": rng.choice(answers).format(**words)})
    return messages


def main():
    rng = random.Random(11)
    for _ in range(int(sys.argv[1])):
        print(json.dumps(dialogue(rng), ensure_ascii=False))


if __name__ == "__main__":
    main()
